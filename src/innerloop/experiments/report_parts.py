"""Parts of a report that hang on what was measured beside the runs: controls.json and stability.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from innerloop.experiments.html import escape, figure, paragraph, table
from innerloop.experiments.summary import CONTROLS, STABILITY, Standing
from innerloop.experiments.svg import Curve, Mark, curves
from innerloop.measure.control_verdict import Kind

KINDS: dict[Kind, str] = {
    "carried": "carry the answer",
    "partly": "carry some answers",
    "room": "are room to compute in",
    "unused": "are not used",
    "undecided": "undecided",
    "none": "none",
}
STATED = ("change", "cosine", "step_cosine", "drift", "radius", "growth", "kl")
TITLES = ("change", "cosine", "cosine of steps", "size against loop 1", "spectral radius", "growth", "KL, nats")


def controls_part(standings: Sequence[Standing]) -> str:
    """Show what happens to answers when latents are edited, and what is said of it."""
    found = [(s, files) for s in standings if (files := s.beside(CONTROLS))]
    if not found:
        return ""
    titles: dict[str, str] = {}
    for _, files in found:
        titles |= {entry["control"]: entry["title"] for file in files for entry in file["controls"]}
    rows = []
    for standing, files in found:
        if not any(file["controls"] for file in files):
            continue
        kinds = dict.fromkeys(KINDS[file["verdict"]["kind"]] for file in files)
        row = [standing.name, ", ".join(kinds), _percent([file["unedited"]["accuracy"] for file in files])]
        for control in titles:
            entries = [entry for file in files for entry in file["controls"] if entry["control"] == control]
            row.append(_edited(entries))
        rows.append([*row, _percent([file["commonest"] for file in files])])
    head = ["method", "the latents", "as it is", *titles.values(), "commonest answer"]
    note = "Accuracy in percent with the latents edited, and the difference; * where it can be told from 0."
    kept = [_kept(standing, files[0]) for standing, files in found if len(files[0].get("kept_latents", ())) > 1]
    picture = ""
    if kept:
        shown = curves(kept, "share of the latents that the answer sees")
        picture = figure(shown, "Accuracy when the answer sees the first latents alone.")
    told = [(s.name, file, len(files)) for s, files in found for file in files if file["verdict"]["kind"] != "none"]
    without = [s.name for s, files in found if all(file["verdict"]["kind"] == "none" for file in files)]
    return (
        "<h2>Do the latents carry the answer?</h2>"
        + (table(head, rows, note) if rows else "")
        + picture
        + _list(
            f"{name}: {file['verdict']['sentence']}" + (f" (seed {file['seed']})" if n > 1 else "")
            for name, file, n in told
        )
        + (paragraph(f"Without latents that could be edited: {', '.join(without)}.") if without else "")
    )


def _edited(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the cell of a control, the mean of the seeds."""
    if not entries:
        return "-"
    difference = 100 * sum(entry["difference"] for entry in entries) / len(entries)
    star = "*" if all(entry["told_apart"] for entry in entries) else ""
    return f"{_percent([entry['accuracy'] for entry in entries])} ({difference:+.1f}){star}"


def _kept(standing: Standing, file: Mapping[str, Any]) -> Curve:
    marks = [
        Mark(standing.name, at["accuracy"], at["ci95"][0], at["ci95"][1], at["kept"] / max(at["of"], 1))
        for at in file["kept_latents"]
    ]
    return Curve(standing.name, marks)


def stability_part(standings: Sequence[Standing]) -> str:
    """Show how the state moves from loop to loop, and what is said of it."""
    found = [(s, files) for s in standings if (files := s.beside(STABILITY))]
    if not found:
        return ""
    rows = []
    for standing, files in found:
        last = [file["loops"][-1] for file in files if file["loops"]]
        cells = [_mean([entry[name] for entry in last]) for name in STATED]
        diverged = _percent([file["diverged"] for file in files])
        rows.append([standing.name, str(last[0]["loop"]) if last else "-", *cells, diverged])
    lines = [
        Curve(standing.name, [_moved(at) for at in files[0]["loops"] if at["change"] is not None])
        for standing, files in found
    ]
    lines = [line for line in lines if len(line.marks) > 1]
    picture = ""
    if lines:
        shown = curves(lines, "loop", are_shares=False)
        picture = figure(shown, "Relative change of the state, mean over examples, and its 5 % to 95 % quantiles.")
    told = [(standing.name, sentence) for standing, files in found for sentence in files[0].get("sentences", ())]
    note = "Means over examples at the last loop; diverged is the share of examples in percent."
    return (
        "<h2>Is the loop stable?</h2>"
        + _list(f"{name}: {sentence}" for name, sentence in told)
        + table(["method", "loop", *TITLES, "diverged, %"], rows, note)
        + picture
    )


def _moved(at: Mapping[str, Any]) -> Mark:
    change = at["change"]
    return Mark(str(at["loop"]), change["mean"], change["low"], change["high"], at["loop"])


def _mean(entries: Sequence[Mapping[str, Any] | None]) -> str:
    means = [entry["mean"] for entry in entries if entry is not None and entry["mean"] is not None]
    return f"{sum(means) / len(means):.3g}" if means else "-"


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.1f}"


def _list(sentences: Any) -> str:
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul class=verdicts>{listed}</ul>" if listed else ""
