"""Pages say what was measured: their tables are those that benchmarks/tables.py writes, and their files exist."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_tables_are_those_of_the_results(page: Path):
    assert tables.filled(page.read_text(), tables.to_root(page)) == page.read_text(), "run: python benchmarks/tables.py"


def test_a_wrong_number_is_noticed():
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    path = next(p for p in results if '"points"' in p.read_text() and '"variants"' in p.read_text())
    page = f"<!-- table: {path.name} -->\n| variant |\n<!-- end -->\n"
    assert tables.filled(page) != page and tables.filled(tables.filled(page)) == tables.filled(page)


def test_a_file_that_is_not_there_is_said_to_be_missing_and_a_smoke_run_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = "<!-- table: halting.json -->\n<!-- end -->\n"
    assert "Not measured yet: there is no halting.json" in tables.filled(page)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/halting.json").write_text('{"kind": "halting", "smoke": true}')
    with pytest.raises(ValueError, match="measures nothing"):
        tables.filled(page)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_what_pages_point_to_exists(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    for recipe in re.findall(r"recipes/[\w./-]+\.yaml", page.read_text()):
        assert (ROOT / recipe).exists(), recipe
