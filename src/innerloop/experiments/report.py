"""report.html: a comparison as one self-contained page that opens from disk, without network.

A page is a list of sections: headings, sentences, tables, pictures, settings; `report.html` says how each is shown.
What happens to edited latents, and how stable a loop is, comes from controls.json and stability.json beside the runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from innerloop.disk.files import write_text
from innerloop.experiments.charts import Curve, Figure, bars, curves, scatter
from innerloop.experiments.summary import (
    CONTROLS,
    STABILITY,
    Mark,
    MethodResult,
    against_cot,
    caption,
    columns,
    failure_lines,
    interval_kind,
)
from innerloop.lens.page import page
from innerloop.measure.control_verdict import Kind
from innerloop.train.recipe import CONFIG

Section = Mapping[str, Any]
KINDS: dict[Kind, str] = {
    "carried": "carry the answer",
    "partly": "carry some answers",
    "room": "are room to compute in",
    "unused": "are not used",
    "undecided": "undecided",
    "none": "none",
}
STATED = {
    "change": "change",
    "cosine": "cosine",
    "step_cosine": "cosine of steps",
    "drift": "size against loop 1",
    "radius": "spectral radius",
    "growth": "growth",
    "kl": "KL, nats",
}


def write_report(
    path: Path,
    title: str,
    rows: Sequence[MethodResult],
    verdicts: Sequence[str] = (),
    failed: Mapping[str, Sequence[str]] | None = None,
    suite: Mapping[str, Any] | None = None,
) -> None:
    """Write a comparison as a page; the same results give the same bytes.

    Args:
        path: the file.
        title: the heading.
        rows: the methods.
        verdicts: sentences on who is better, each with its interval.
        failed: why jobs have no result, each reason with its jobs.
        suite: the sections of the suite that was run, if it was one.
    """
    sections = [*summary(rows), {"failed": failure_lines(failed or {})}]
    if rows:
        sections += [
            *said("Who is better", verdicts),
            {"heading": "Results"},
            table(*columns(rows), _caption(rows)),
            {"heading": "Accuracy"},
            picture(bars([row.mark for row in rows]), interval_kind(rows)),
            *_costs(rows),
            *_loops(rows),
            *_controls(rows),
            *_stability(rows),
            *_configurations(rows, suite),
        ]
    write_text(path, document(title, sections))


def document(title: str, sections: Sequence[Section]) -> str:
    """Return a page of sections."""
    has_figures = any("figure" in section or "pair" in section for section in sections)
    return page("innerloop.experiments", "report.html", title=title, parts=sections, has_figures=has_figures)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Section:
    """Return a table; the first cell of a row names it."""
    return {"head": head, "rows": rows, "caption": caption}


def picture(figure: Figure, caption: str) -> Section:
    """Return a picture with what it shows."""
    return {"figure": figure, "caption": caption}


def said(heading: str, sentences: Iterable[str]) -> list[Section]:
    """Return sentences under their heading; nothing where there are none."""
    told = list(sentences)
    return [{"heading": heading}, {"said": told}] if told else []


def details(title: str, value: Any) -> Section:
    """Return settings that open on a click, as JSON."""
    return {
        "details": title,
        "text": value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False),
    }


def summary(rows: Sequence[MethodResult]) -> list[Section]:
    """Say what was answered, by how many seeds, where and with which versions."""
    results = [result for row in rows for result in row.results]
    if not results:
        return []
    tasks = {f"{r['task']['name']}/{r['split']}": None for r in results if "task" in r}
    seeds = sorted({r["seed"] for r in results if r.get("seed") is not None})
    told = [f"{' and '.join(map(str, sorted({r['n'] for r in results if 'n' in r})))} examples of {', '.join(tasks)}"]
    told += [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"] if seeds else []
    told += sorted({r["device"] for r in results if "device" in r})
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in results if "versions" in r})
    return [{"note": "; ".join([*told, *versions]) + "."}]


def _caption(rows: Sequence[MethodResult]) -> str:
    ratios = against_cot(rows)
    note = ""
    if any(ratio is not None for ratio in ratios):
        note = " time / CoT is the time of an example divided by that of written steps, in the same engine"
        note += ", given where device and versions are the same." if None in ratios else "."
    return caption(rows) + note


def _costs(rows: Sequence[MethodResult]) -> list[Section]:
    """Draw accuracy against what an example costs: passes, and time where all were timed on one machine."""
    if len(rows) < 2:
        return []
    passes = scatter([row.at(row.cost("passes")) for row in rows], "passes of the model per example")
    pictures = [picture(passes, "Accuracy against passes. The dashed line joins those that nothing cheaper equals.")]
    sections: list[Section] = [{"heading": "What accuracy costs"}, {"pair": pictures}]
    if all(row.turns for row in rows) or len({machine for row in rows for machine in row.machine}) == 1:
        shown = scatter([row.at(1000 * row.seconds) for row in rows], "milliseconds per example", log=True)
        note = "Accuracy against time, on one machine, in the same engine; the axis is logarithmic."
        pictures.append(picture(shown, note))
    else:
        told = "Times are not drawn: they were taken on different devices or with other versions."
        sections.append({"note": told})
    return sections


def _loops(rows: Sequence[MethodResult]) -> list[Section]:
    """Draw accuracy by number of loops."""
    lines = [Curve(row.name, row.loops, row.method.get("max_loops")) for row in rows if len(row.loops) > 1]
    if not lines:
        return []
    note = "Accuracy by number of loops when answering, with its interval."
    note += " A ring marks the number trained with." if any(line.trained is not None for line in lines) else ""
    return [{"heading": "Accuracy against loops"}, picture(curves(lines, "loops"), note)]


def _controls(rows: Sequence[MethodResult]) -> list[Section]:
    """Show what happens to answers when latents are edited, and what is said of it."""
    found = [(row, files) for row in rows if (files := row.beside(CONTROLS))]
    if not found:
        return []
    edits = [entry for _, files in found for file in files for entry in file["controls"]]
    titles = {entry["control"]: entry["title"] for entry in edits}
    cells = []
    for row, files in found:
        if any(file["controls"] for file in files):
            kinds = dict.fromkeys(KINDS[file["verdict"]["kind"]] for file in files)
            own = [[e for file in files for e in file["controls"] if e["control"] == control] for control in titles]
            as_it_is = _percent([file["unedited"]["accuracy"] for file in files])
            commonest = _percent([file["commonest"] for file in files])
            cells.append([row.name, ", ".join(kinds), as_it_is, *map(_edited, own), commonest])
    head = ["method", "the latents", "as it is", *titles.values(), "commonest answer"]
    note = "Accuracy in percent with the latents edited, and the difference; * where it can be told from 0."
    sections = [table(head, cells, note)] if cells else []
    kept = [_kept(row.name, files[0]) for row, files in found if len(files[0].get("kept_latents", ())) > 1]
    if kept:
        shown = curves(kept, "share of the latents that the answer sees")
        sections.append(picture(shown, "Accuracy when the answer sees the first latents alone."))
    told = [
        f"{row.name}: {file['verdict']['sentence']}" + (f" (seed {file['seed']})" if len(files) > 1 else "")
        for row, files in found
        for file in files
        if file["verdict"]["kind"] != "none"
    ]
    without = [row.name for row, files in found if all(file["verdict"]["kind"] == "none" for file in files)]
    sections += [{"said": told}] if told else []
    sections += [{"note": f"Without latents that could be edited: {', '.join(without)}."}] if without else []
    return [{"heading": "Do the latents carry the answer?"}, *sections]


def _edited(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the cell of a control, the mean of the seeds."""
    if not entries:
        return "-"
    difference = 100 * sum(entry["difference"] for entry in entries) / len(entries)
    star = "*" if all(entry["told_apart"] for entry in entries) else ""
    return f"{_percent([entry['accuracy'] for entry in entries])} ({difference:+.1f}){star}"


def _kept(name: str, file: Mapping[str, Any]) -> Curve:
    shares = [(at["accuracy"], at["ci95"], at["kept"] / max(at["of"], 1)) for at in file["kept_latents"]]
    return Curve(name, [Mark(name, accuracy, low, high, x) for accuracy, (low, high), x in shares])


def _stability(rows: Sequence[MethodResult]) -> list[Section]:
    """Show how the state moves from loop to loop, and what is said of it."""
    found = [(row, files) for row in rows if (files := row.beside(STABILITY))]
    if not found:
        return []
    cells = []
    for row, files in found:
        last = [file["loops"][-1] for file in files if file["loops"]]
        measures = [_mean([entry[name] for entry in last]) for name in STATED]
        diverged = _percent([file["diverged"] for file in files])
        cells.append([row.name, str(last[0]["loop"]) if last else "-", *measures, diverged])
    lines = [
        Curve(row.name, [_moved(at) for at in files[0]["loops"] if at["change"] is not None]) for row, files in found
    ]
    lines = [line for line in lines if len(line.marks) > 1]
    note = "Means over examples at the last loop; diverged is the share of examples in percent."
    told = [f"{row.name}: {sentence}" for row, files in found for sentence in files[0].get("sentences", ())]
    sections: list[Section] = [{"heading": "Is the loop stable?"}, *([{"said": told}] if told else [])]
    sections.append(table(["method", "loop", *STATED.values(), "diverged, %"], cells, note))
    if lines:
        shown = curves(lines, "loop", are_shares=False)
        moved = "Relative change of the state, mean over examples, and its 5 % to 95 % quantiles."
        sections.append(picture(shown, moved))
    return sections


def _moved(at: Mapping[str, Any]) -> Mark:
    change = at["change"]
    return Mark(str(at["loop"]), change["mean"], change["low"], change["high"], at["loop"])


def _mean(entries: Sequence[Mapping[str, Any] | None]) -> str:
    means = [entry["mean"] for entry in entries if entry is not None and entry["mean"] is not None]
    return f"{sum(means) / len(means):.3g}" if means else "-"


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.1f}"


def _configurations(rows: Sequence[MethodResult], suite: Mapping[str, Any] | None) -> list[Section]:
    """Show what produced the numbers: the suite, and of each row its recipe, or its method where that is all."""
    sections: list[Section] = [{"heading": "Configurations"}]
    sections += [details("the suite", dict(suite))] if suite is not None else []
    for row in rows:
        recipe = next((folder / CONFIG for folder in row.folders if (folder / CONFIG).exists()), None)
        if recipe is not None:
            sections.append(details(row.name, recipe.read_text(encoding="utf-8")))
        elif row.method:
            sections.append(details(row.name, row.method))
    first = rows[0].results[0]
    found = {name: first[name] for name in ("task", "versions", "device") if name in first}
    return [*sections, details("task and versions", found)]
