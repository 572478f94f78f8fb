from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def fixtures():
    """The folder with a few rows of each original format."""
    return TESTS / "fixtures"


@pytest.fixture(scope="session")
def shared_data():
    """The folder with the real data sets, which lies beside the repository where there is one."""
    folder = TESTS.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder
