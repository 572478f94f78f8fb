"""report.html: a comparison as one self-contained page that opens from disk, without scripts or network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from innerloop.experiments.html import document, escape, figure, paragraph, settings, table
from innerloop.experiments.report_parts import controls_part, stability_part
from innerloop.experiments.summary import Standing, against_cot, caption, columns, interval_kind
from innerloop.experiments.svg import Curve, bars, curves, scatter
from innerloop.model.checkpoint import write_text
from innerloop.train.run import CONFIG


def write_report(
    path: Path,
    title: str,
    standings: Sequence[Standing],
    verdicts: Sequence[str] = (),
    failed: Mapping[str, Sequence[str]] | None = None,
    suite: Mapping[str, Any] | None = None,
) -> None:
    """Write a comparison as a page; the same results give the same bytes.

    Args:
        path: the file.
        title: the heading.
        standings: the rows.
        verdicts: sentences on who is better, each with its interval.
        failed: why points have no result, each reason with its points.
        suite: the sections of the suite that was run, if it was one.
    """
    parts = [summary(standings) if standings else "", failed_part(failed or {})]
    if standings:
        parts += [
            _verdicts(verdicts),
            "<h2>Results</h2>",
            table(*columns(standings), _caption(standings)),
            "<h2>Accuracy</h2>",
            figure(bars([s.mark for s in standings]), interval_kind(standings)),
            _cost_pictures(standings),
            _loops(standings),
            controls_part(standings),
            stability_part(standings),
            _configurations(standings, suite),
        ]
    write_text(path, document(title, parts))


def summary(standings: Sequence[Standing]) -> str:
    """Say what was answered, by how many seeds, where and with which versions."""
    results = [result for standing in standings for result in standing.results]
    tasks = {f"{r['task']['name']}/{r['split']}": None for r in results if "task" in r}
    seeds = sorted({r["seed"] for r in results if r.get("seed") is not None})
    told = [f"{' and '.join(map(str, sorted({r['n'] for r in results if 'n' in r})))} examples of {', '.join(tasks)}"]
    told += [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"] if seeds else []
    told += sorted({r["device"] for r in results if "device" in r})
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in results if "versions" in r})
    return paragraph("; ".join([*told, *versions]) + ".")


def failed_part(failed: Mapping[str, Sequence[str]]) -> str:
    """List the points that have no result, each reason once."""
    if not failed:
        return ""
    told = [f"{'; '.join(points)}: {reason}" for reason, points in failed.items()]
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in told)
    return f"<div class=failed><h2>Without a result</h2><ul>{listed}</ul></div>"


def _verdicts(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>Who is better</h2><ul class=verdicts>{listed}</ul>"


def _caption(standings: Sequence[Standing]) -> str:
    ratios = against_cot(standings)
    note = ""
    if any(ratio is not None for ratio in ratios):
        note = " time / CoT is the time of an example divided by that of written steps, in the same engine"
        note += ", given where device and versions are the same." if None in ratios else "."
    return caption(standings) + note


def _cost_pictures(standings: Sequence[Standing]) -> str:
    """Draw accuracy against what an example costs: passes, and time where all were timed on one machine."""
    if len(standings) < 2:
        return ""
    passes = scatter([s.at(s.cost("passes")) for s in standings], "passes of the model per example")
    pictures = [figure(passes, "Accuracy against passes. Blue: nothing cheaper is as accurate.")]
    if all(s.turns for s in standings) or len({machine for s in standings for machine in s.machine}) == 1:
        shown = scatter([s.at(1000 * s.seconds) for s in standings], "milliseconds per example", log=True)
        pictures.append(
            figure(shown, "Accuracy against time, on one machine, in the same engine; the axis is logarithmic.")
        )
    else:
        pictures.append(paragraph("Times are not drawn: they were taken on different devices or with other versions."))
    return f"<h2>What accuracy costs</h2><div class=pair>{''.join(pictures)}</div>"


def _loops(standings: Sequence[Standing]) -> str:
    """Draw accuracy by number of loops."""
    looped = [s for s in standings if len(s.loops) > 1]
    if not looped:
        return ""
    trained = [s.method.get("max_loops") for s in looped]
    note = "Accuracy by number of loops when answering, with its interval."
    note += " A ring marks the number trained with." if any(n is not None for n in trained) else ""
    picture = curves([Curve(s.name, s.loops) for s in looped], "loops", trained)
    return f"<h2>Accuracy against loops</h2>{figure(picture, note)}"


def _configurations(standings: Sequence[Standing], suite: Mapping[str, Any] | None) -> str:
    """Show what produced the numbers: the suite, and of each row its recipe, or its method where that is all."""
    parts = ["<h2>Configurations</h2>"]
    if suite is not None:
        parts.append(settings("the suite", dict(suite)))
    for standing in standings:
        recipe = next((f / CONFIG for f in standing.folders if (f / CONFIG).exists()), None)
        if recipe is not None:
            parts.append(settings(standing.name, recipe.read_text(encoding="utf-8")))
        elif standing.method:
            parts.append(settings(standing.name, standing.method))
    first = standings[0].results[0]
    parts.append(settings("task and versions", {k: first[k] for k in ("task", "versions", "device") if k in first}))
    return "".join(parts) if len(parts) > 1 else ""
