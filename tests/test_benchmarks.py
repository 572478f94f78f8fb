"""The benchmark scripts run at smoke size, say what produced their files, and their tables can be written."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    "engine",
    "latent_against_text",
    "training",
    "scaling",
    "halting",
    "measuring",
    "soak",
    "serve",
    "startup",
    "compiled",
    "packed",
    "shared_prefix",
    "rollouts",
    "loss_memory",
    "breakdown",
]
PARTS = dict.fromkeys(SCRIPTS, ("",)) | {
    "engine": ("reference", "bare"),
    "serve": ("", "replicas"),
    "compiled": ("", "pass"),
}


def run(script: str, out: Path, *arguments: object) -> dict:
    """Run a script at smoke size; return what it wrote."""
    path = ROOT / "benchmarks" / f"{script}.py"
    command = [sys.executable, str(path), "--smoke", "--threads", "1", "--out", str(out), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script", PARTS)
def test_a_script_runs_and_its_table_can_be_written(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture = tmp_path / "picture.svg"
    results = tmp_path / "benchmarks/results" / f"{script}.json"
    report = run(script, results, *(["--svg", picture] if script == "breakdown" else []))
    assert report["kind"] == script and report["smoke"] and report["seed"] == 0 and report["threads"] == 1
    assert {"versions", "commit", "device", "dtype"} <= set(report)
    check(script, report, picture)

    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    results.write_text(json.dumps({**report, "smoke": False}))
    for part in PARTS[script]:
        lines = tables.table(f"{script}.json", part, "../").splitlines()
        widths = {line.count("|") for line in lines if line.startswith("|")}
        assert len(widths) == 1 and len(lines) >= 5 and f"results/{script}.json" in lines[-1]


@pytest.mark.slow
def test_all_that_is_for_a_gpu_runs_in_one_call_and_goes_on_where_it_ended(tmp_path: Path):
    out = tmp_path / "gpu.json"
    asked = ("--device", "cpu", "--dtype", "float32")
    report = run("gpu", out, *asked)
    points = report["points"]
    assert set(points) == {
        *("peers", "compiled", "latent_against_text", "canvases", "halting", "training", "shared_prefix")
    }
    assert all(point["kind"] == name and point["smoke"] for name, point in points.items())
    by_name = {point["method"]: point for point in points["canvases"]["points"]}
    assert by_name["llada, 4 passes"]["passes"] == 4 and by_name["text"]["passes"] == 8
    out.write_text(json.dumps({**report, "points": {**points, "halting": {"failed": "no time was left"}}}))
    again = run("gpu", out, *asked)["points"]
    assert again["halting"]["kind"] == "halting" and {**again, "halting": points["halting"]} == points


def check(script: str, report: dict, picture: Path) -> None:
    """Look at what is particular to a script."""
    match script:
        case "engine":
            names = [p["method"] for p in report["reference"]["points"]]
            assert names == ["cot", "coconut", "slr", "lotus", "lotus, 6 loops"]
            assert all(p["same_tokens"] for p in report["reference"]["points"]) and report["bare"]["same_tokens"]
            assert report["bare"]["shapes"] == [11, 1, 1, 1, 1, 1, 2, 1, 1]
        case "latent_against_text":
            by_name = {point["method"]: point for point in report["points"]}
            assert by_name["lotus, 48 x 3"]["loops"] == 3 and by_name["text, 12"]["written"]
            assert by_name["text, 12"]["cost"]["passes"] == 12 + report["answer_tokens"]
            assert by_name["text, 6"]["faster than text, 6"]["total"]["median"] == 1.0
        case "training":
            assert all(point["loops"] == 6 for point in report["points"])
            assert all(point["gradients"]["relative_gap"] <= 1e-5 for point in report["points"])
            assert report["question_tokens"] >= 4 * report["answer_tokens"]
        case "scaling":
            assert set(report["axes"]) == set(report["base"])
            sizes = [point["weights"] for point in report["axes"]["size"]["answering"]["points"]]
            assert sizes[0] < sizes[1]
        case "halting":
            for point in report["points"]:
                assert point["least"] >= 1 and point["most"] <= 16
                assert point["least"] < point["mean_loops"]["median"] < point["most"]
        case "measuring":
            kinds = {point["kind"] for point in report["points"]}
            assert len(kinds) == 11 and {p["against"] for p in report["points"] if p["part"] == "lens"} != {
                "plain evaluation"
            }
            edits = [p for p in report["points"] if p["kind"] == "a control that edits latents"]
            assert len(edits) == 7 and all(0.9 < p["positions"] < 2 for p in edits)
        case "soak":
            assert all(point["answered"] == 58 and point["failed"] == 6 for point in report["points"])
            assert all(point["checked_alone"] == 4 for point in report["points"])
        case "serve":
            assert [point["method"] for point in report["points"]] == ["slr", "cot"]
            assert all(0 < p["first_ms"]["p50"] <= p["whole_ms"]["p99"] and p["ratio"] > 0 for p in report["points"])
            assert len(report["memory"]["mib"]) == 20
        case "startup":
            light, ask = report["points"][1:5], report["points"][-1]
            assert [point["imports"] for point in light] == [[]] * 4 and ask["imports"] == ["torch", "transformers"]
            assert all(0 < point["peak_mib"]["median"] < 100 < ask["peak_mib"]["median"] for point in light)
        case "compiled":
            assert all(point["same_tokens"] for point in report["points"])
            assert report["thought_pass"]["floor_ms"] > 0
        case "packed":
            assert all(point["same_tokens"] and point["n_packed"] > 0 for point in report["points"])
        case "shared_prefix":
            assert [point["spared"] for point in report["points"]] == [48, 64] * 2
        case "rollouts":
            assert all(point["same_rows"] == point["rows"] == 64 for point in report["points"])
        case "loss_memory":
            assert [point["loss_chunk"] for point in report["points"]] == [None, 256, 64, 16]
            assert all(point["gradients"]["relative_gap"] <= 1e-5 for point in report["points"])
            assert report["points"][3]["peak_mib"] < report["points"][0]["peak_mib"]
        case "breakdown":
            assert all(sum(point["shares"].values()) == pytest.approx(1) for point in report["points"])
            assert picture.read_text().startswith("<svg") and "batch 2" in picture.read_text()
