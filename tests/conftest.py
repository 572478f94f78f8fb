"""What every test shares; the models themselves are made by plain functions in tests/models.py."""

import pytest
import torch
import transformers

from innerloop.examples import Example
from tests import models


def pytest_configure() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same weights in every run, whatever ran before on the same worker."""
    torch.manual_seed(0)


@pytest.fixture(params=models.ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    """Every architecture, one after the other."""
    return request.param


@pytest.fixture
def examples() -> list[Example]:
    """Eight chain examples of three steps each."""
    return list(models.chain_examples(8, 3))
