"""Fixtures for all tests; the models themselves are made by plain functions in tests/models.py."""

import pytest
import torch
import transformers

from tests import models


def pytest_configure() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def tiny_backbone():
    """``tiny_backbone(arch, seed=0, **config changes)``: see tests/models.py."""
    return models.tiny_backbone


@pytest.fixture
def tiny_model():
    """``tiny_model(method, arch="llama", seed=0, **config changes)``: see tests/models.py."""
    return models.tiny_model


@pytest.fixture
def examples():
    """Eight chain examples of three steps each."""
    return list(models.chain_examples(8, 3))


@pytest.fixture(params=models.ARCHS)
def arch(request) -> str:
    """Every architecture, one after the other."""
    return request.param
