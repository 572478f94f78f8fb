"""The wheel: what it says of itself, which extras it has, and that README reads well where the repository is not."""

import importlib.util
import re
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINK = re.compile(r"\]\(([^)]+)\)")

spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
hatch_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hatch_build)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    builders = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    return message_from_bytes(wheel.read(name))


def test_the_wheel_says_what_it_is(metadata: Message):
    told = {name: metadata[name] for name in ("Name", "License-Expression", "Requires-Python", "Summary")}
    assert told == {
        "Name": "innerloop",
        "License-Expression": "Apache-2.0",
        "Requires-Python": ">=3.11",
        "Summary": PROJECT["description"],
    }
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_every_extra_is_explained(metadata: Message):
    page = (ROOT / "docs/getting_started.md").read_text()
    explained = set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE))
    assert set(metadata.get_all("Provides-Extra")) <= explained


def test_every_extra_that_a_message_names_is_there(metadata: Message):
    calls = re.compile(r'check_installed\("[^"]*", "(\w+)"')
    named = {extra for path in (ROOT / "src").rglob("*.py") for extra in calls.findall(path.read_text())}
    assert named and named <= set(metadata.get_all("Provides-Extra"))


def test_no_link_of_the_package_page_leads_nowhere(metadata: Message):
    page = metadata.get_payload()
    assert page.startswith("# innerloop") and "<!--" not in page
    assert [link for link in LINK.findall(page) if not re.match(r"https?://|#", link)] == []


def test_with_an_address_links_go_to_the_repository():
    text = hatch_build.for_package_page("[a](docs/a.md#b), ![c](d.png), [e](#f), [g](https://h)", "https://host/repo/")
    where = "https://host/repo/blob/main/"
    assert text == f"[a]({where}docs/a.md#b), ![c]({where}d.png), [e](#f), [g](https://h)"


def test_pages_and_types_travel_with_the_wheel(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    files = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*") if p.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names
