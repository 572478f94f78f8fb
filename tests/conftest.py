"""What every test shares; the models themselves are made by plain functions in tests/models.py."""

import gc
import os

import pytest
import torch
import transformers

from innerloop.text.examples import Example
from tests import models
from tests.methods.tools import restore_bases

LARGE_GRID = 12  # cases of one test


def pytest_configure() -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # no test pulls the plug, and disks are slow
    transformers.utils.logging.disable_progress_bar()


def pytest_collection_finish() -> None:
    """Keep the libraries out of garbage collections; the Trainer asks for a full one after every training."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave two of three cases of a method's large grids to the slow tests; the fast ones run every third."""
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "tests/methods/" in item.nodeid:
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in grids.values():
        if len(cases) > LARGE_GRID:
            for i, item in enumerate(cases):
                if i % 3:
                    item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same weights in every run, whatever ran before on the same worker."""
    torch.default_generator.manual_seed(0)  # of the CPU alone: a seed kept for GPUs costs milliseconds


@pytest.fixture(autouse=True)
def unspoiled() -> None:
    """Let no test find what another has taught the models that they share."""
    restore_bases()


@pytest.fixture(params=models.ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    """Every architecture, one after the other."""
    return request.param


@pytest.fixture
def examples() -> list[Example]:
    """Eight chain examples of three steps each."""
    return list(models.chain_examples(8, 3))
