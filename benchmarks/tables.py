"""Write the tables of docs/ and README from the results beside this file, so that no number is typed by hand.

python benchmarks/tables.py            # a test fails where a page differs from what this would write

A page has, around each table, <!-- table: FILE.json [PART] --> and <!-- end -->. FILE.json is in benchmarks/results. It
was written by `innerloop compare SUITE --results` (with the parts `loops` and `also` the columns are numbers of
iterations, on the suite's own or on other examples, with `controls` what is answered when the thought is another), by
`innerloop bench`, or by a benchmark beside this file, which says its kind. What is not there yet is said to be missing;
what was run with --smoke is refused. <!-- table: overview --> is of several suites.
"""

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from innerloop.experiments.summary import MethodResult, by_variant
from innerloop.measure.statistics import over_seeds, share_noise

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/evidence").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\S+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURES = {"breakdown": "performance.svg"}  # in docs/, shown above a table where they are there
Lines = list[list[str]]
COLUMNS = ("steps in text", "no steps", "latents (SLR)", "layer in a loop", "as many layers", "masks (LLaDA)")
OVERVIEW = (  # of each task what a guess has, the suite, and the variant of each column
    ("sums modulo seven, two steps", "14 %", "chain-all", ("cot", "no_cot", "slr", "looped", None, None)),
    (
        "state tracking, six swaps",
        "25 %",
        "depth",
        ("text, 1 layer", "dense, 1 layer", "slr, 1 layer, 6 loops", "looped, 1 x 6", "dense, 6 layers", None),
    ),
    ("p-hop, two jumps", "25 %", "phop", (None, "dense, 1 layer", None, "looped, 1 x 4", "dense, 4 layers", None)),
    ("two digits times two", "0 %", "multiplication", ("cot", "no_cot", "slr", None, None, "llada")),
)
DEAR = {  # kinds of measuring that need more than two plain evaluations by nature
    "the probes of a target": "two regressions for each latent and loop, whatever the model's size",
    "the states that probes learn from, of two splits": "twice the rows",
    "stability": "20 Jacobian-vector products for each loop, of 32 rows",
}


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(), to_root(page)))


def to_root(page: Path) -> str:
    """Return what a link on a page begins with to reach the root."""
    return "../" * len(page.parent.relative_to(ROOT).parts)


def filled(text: str, root: str = "../") -> str:
    """Return a page with its tables written anew; ``root`` is what links to files begin with."""
    return TABLE.sub(lambda m: f"{m[1]}{table(m[2], m[3] or '', root)}{m[4]}", text)


def table(name: str, part: str, root: str) -> str:
    """Return the table of a file of results in Markdown, with where its numbers come from."""
    if name == "overview":
        return overview(root)
    path = ROOT / "benchmarks" / "results" / name
    if not path.exists():
        return f"*Not measured yet: there is no {name}.*\n"
    results = json.loads(path.read_text())
    if results.get("smoke"):
        raise ValueError(f"{name} was run with --smoke, which measures nothing")
    kind = results.get("kind", "suite")
    if kind == "suite":
        lines, note = longer_lines(results) if part == "also" else suite_lines(results, part)
    else:
        lines, note = KINDS[kind, part](results)
    head, *rows = lines
    shown = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    if kind in PICTURES and (ROOT / "docs" / PICTURES[kind]).exists():
        shown = [f"![{kind}]({'' if root else 'docs/'}{PICTURES[kind]})", "", *shown]
    return "\n".join([*shown, "", f"{note}[{name}]({root}benchmarks/results/{name})", ""])


def overview(root: str) -> str:
    """Return the table of what each way of thinking has on several tasks: the mean over seeds, and the worst seed."""
    lines = [["task", "a guess", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    for task, guess, suite, variants in OVERVIEW:
        results = json.loads((ROOT / "benchmarks" / "results" / f"{suite}.json").read_text())
        found = {v: [p["accuracy"] for p in results["points"] if p["variant"] == v] for v in variants}
        means = [f"{100 * statistics.mean(found[v]):.1f} % ({100 * min(found[v]):.1f})" if v else "-" for v in variants]
        lines.append([f"[{task}]({root}benchmarks/results/{suite}.json)", guess, *means])
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), ""])


def suite_lines(results: dict, part: str) -> tuple[Lines, str]:
    """Return the lines of a suite: a variant each, with the mean over seeds by loops, or also the worst seed."""
    rows = by_variant([{**point, "n": results["n"]} for point in results["points"]])
    seeds = sorted({point["seed"] for point in results["points"]})
    if part in ("loops", "worst"):
        looped = [row for row in rows if any(result.get("loops") for result in row.results)]
        head = ["variant", *(f"{mark.name} loops" for mark in looped[0].loops)]
        lines = [[row.name, *by_loops(row, part == "worst")] for row in looped]
    elif part == "controls":
        head = ["variant", "as it is", "without it", "spoiled", "another's", "the answer is then the other's"]
        lines = [edited_line(row) for row in rows if all(result.get("edited") for result in row.results)]
    else:
        head = ["variant", "accuracy", "95 % interval", "by seed", "passes", "positions", "thought", "MFLOPs"]
        lines = [suite_line(row) for row in rows]
    failed = [f"{p['variant']} seed {p['seed']}" for p in results["points"] if "error" in p]
    note = (
        f"n = {results['n']} {results['split']} questions, seeds {', '.join(map(str, seeds))}, {results['device']}, "
        f"torch {results['versions']['torch']}, transformers {results['versions']['transformers']}; "
        + (f"failed: {', '.join(failed)}; " if failed else "")
    )
    return [head, *lines], note


def by_loops(row: MethodResult, with_worst: bool) -> list[str]:
    """Return the mean accuracy of a variant by numbers of loops, and in brackets that of its worst seed."""
    cells = [f"{100 * mark.share:.1f}" for mark in row.loops]
    worst = [min(result["loops"][mark.name]["accuracy"] for result in row.results) for mark in row.loops]
    return [f"{cell} ({100 * low:.1f})" for cell, low in zip(cells, worst)] if with_worst else cells


def suite_line(row: MethodResult) -> list[str]:
    """Return the line of a variant."""
    accuracy, half = over_seeds(row.accuracies, share_noise(row.accuracies, row.results[0]["n"]))
    return [
        row.name,
        f"{100 * accuracy:.1f} %",
        "-" if math.isinf(half) else f"± {100 * half:.1f}",
        ", ".join(f"{100 * value:.1f}" for value in row.accuracies),
        *(f"{row.cost(name):.1f}" for name in ("passes", "positions", "thought_tokens")),
        f"{row.cost('flops') / 1e6:.2f}",
    ]


def edited_line(row: MethodResult) -> list[str]:
    """Return the line of a variant whose thought is taken away, spoiled or another question's: means over seeds."""

    def mean(edit: str, what: str = "accuracy") -> str:
        found = [result["edited"].get(edit, {}).get(what) for result in row.results]
        return "-" if None in found else f"{100 * sum(found) / len(found):.1f} %"

    edits = [mean(edit) for edit in ("hidden", "noise", "shuffled")]
    return [row.name, f"{100 * row.mark.share:.1f} %", *edits, mean("shuffled", "donor_answers")]


def longer_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of a suite that was also tested on other examples: their accuracy by numbers of loops."""
    names = list(dict.fromkeys(point["variant"] for point in results["points"]))
    loops = [n for n in dict.fromkeys(n for p in results["points"] for of in p["also"].values() for n in of)]
    rows = []
    for name in names:
        own = [point["also"] for point in results["points"] if point["variant"] == name]
        for of in own[0]:
            found = {n: [also[of][n]["accuracy"] for also in own if n in also[of]] for n in loops}
            rows.append([name, of, *(f"{100 * sum(v) / len(v):.1f}" if v else "-" for v in found.values())])
    head = ["variant", "tested on", *(n if n == "trained" else f"{n} loops" for n in loops)]
    return [head, *rows], suite_lines(results, "")[1]


def wide(values: dict, digits: int = 1) -> str:
    """Return a median with what the middle four fifths lie between."""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} ({low} to {high})"


def made(results: dict, *facts: str) -> str:
    """Return what produced a file, in words."""
    versions = results["versions"]
    found = [
        "median (p10 to p90)",
        *facts,
        f"seed {results['seed']}",
        results["device"],
        results["dtype"],
        *(f"{name} {versions[name]}" for name in ("torch", "transformers")),
        *([f"commit {results['commit']}"] if results.get("commit") else []),
    ]
    return "; ".join(found) + "; "


def work(results: dict) -> str:
    """Return the shape of the model and the number of turns."""
    shape = results["shape"].get("name", results["shape"]["type"])
    return f"model `{shape}`, {results['repeats']} turns"


def bench_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of `innerloop bench`."""
    phases = ("total", "prefill", "thought", "answer")
    head = ["model", "batch", *(f"{phase}, ms" for phase in phases), "examples/s", "peak MiB", "passes", "floor"]
    rows = [
        [
            f"{name}: `{model['method']['name']}`",
            str(point["batch_size"]),
            *(wide(point["latency_ms"][phase]) for phase in phases),
            wide(point["examples_per_second"]),
            f"{point['peak_mib']:.1f}",
            f"{point['cost']['passes']:.1f}",
            f"{point['floor']['share']['median']:.1%} ({point['floor']['bound']})",
        ]
        for name, model in results["models"].items()
        for point in model["points"]
    ]
    gains = ", ".join(f"{wide(one['speedup'], 2)} at batch {one['batch_size']}" for one in results.get("ratios", ()))
    ceilings = results["ceilings"]
    memory = ceilings.get("memory_gb_s", ceilings.get("copy_gb_s"))  # of a copy alone, once
    facts = [
        f"{results['settings']['repeats']} turns",
        f"ceilings {ceilings['matmul_gflops']['best']:.0f} GFLOP/s and {memory['best']:.1f} GB/s",
        *([f"the run is so many times as fast as the baseline: {gains}"] if gains else []),
    ]
    return [head, *rows], made(results, *facts)


def reference_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of the engine against the plain reference."""
    found = results["reference"]
    head = ["method", "engine, examples/s", "reference, examples/s", "times as fast", "times fewer positions"]
    rows = [
        [
            f"`{point['method']}`",
            *(wide(point["examples_per_second"][side], 2) for side in ("engine", "reference")),
            wide(point["speedup"]),
            f"{point['times_fewer_positions']:.1f}",
        ]
        for point in found["points"]
    ]
    low, high = found["question_tokens"]
    asked = f"questions of {low} to {high} tokens, answers of {found['answer_tokens']}, batch {found['batch_size']}"
    return [head, *rows], made(results, work(found), asked)


def bare_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of the engine against the bare Hugging Face model."""
    found = results["bare"]
    head = ["batch", "engine, ms", "bare model, ms", "engine / bare"]
    rows = [
        [str(p["batch_size"]), wide(p["engine_ms"]), wide(p["bare_ms"]), wide(p["time_ratio"], 2)]
        for p in found["points"]
    ]
    gain = found["batch_gain"]
    facts = [
        f"{found['model']}, {found['question_tokens']} question tokens, {found['latents']} latents, "
        f"{found['answer_tokens']} answer tokens, {found['repeats']} turns",
        f"the larger batch gains {wide(gain['engine'])} in the engine and {wide(gain['bare'])} in the bare model",
    ]
    return [head, *rows], made(results, *facts)


def latent_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of latent methods against text; a ratio below 1 is one where the latents are slower."""
    texts = [f"text, {n}" for n in results["texts"]]
    phases = ("prefill", "thought", "answer", "total")
    head = ["method", "batch", "passes", "positions", *(f"{phase}, ms" for phase in phases)]
    head += [f"{what}, against {text}" for text in texts for what in ("thought", "all")]
    rows, slower = [], []
    for point in results["points"]:
        line = [point["method"], str(point["batch_size"])]
        line += [f"{point['cost'][name]:.0f}" for name in ("passes", "positions")]
        line += [f"{point['ms'][phase]['median']:.1f}" for phase in phases]
        for text in texts:
            gain = point[f"faster than {text}"]
            line += ["-" if gain[what] is None else f"{gain[what]['median']:.2f}" for what in ("thought", "total")]
            if gain["total"]["median"] < 1 and not point["written"]:
                slower.append(f"{point['method']} at batch {point['batch_size']} than {text}")
        rows.append(line)
    facts = [work(results), f"{results['question_tokens']} question tokens, {results['answer_tokens']} answer tokens"]
    told = f"slower are {', '.join(slower)}" if slower else "no latent method is slower as a whole"
    return [head, *rows], made(results, *facts, told)


def training_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of training steps."""
    sides = ("innerloop", "reference")
    head = ["method", "iterations", *(f"{side}, ms" for side in sides), "times as fast"]
    head += [*(f"{side}, peak MiB" for side in sides), "gradients differ by"]
    rows = [
        [
            f"`{point['method']}`",
            str(point["loops"]),
            *(wide(point["ms"][side]) for side in sides),
            wide(point["speedup"], 2),
            *(f"{point['peak_mib'][side]:.1f}" for side in sides),
            f"{point['gradients']['relative_gap']:.1e}",
        ]
        for point in results["points"]
    ]
    shape = f"batch {results['batch_size']}, {results['question_tokens']} question tokens"
    return [head, *rows], made(results, work(results), f"{shape}, {results['answer_tokens']} answer tokens")


def scaling_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of scaling: a line for each value of each axis."""
    parts = ("answering", "training")
    head = ["changed", "to", *(f"{part}, {unit}" for part in parts for unit in ("ms", "peak MiB"))]
    rows = []
    for axis, found in results["axes"].items():
        for points in zip(*(found[part]["points"] for part in parts)):
            cells = [cell for p in points for cell in (wide(p["ms"]), f"{p['peak_mib']:.1f}")]
            rows.append([axis, f"{points[0][axis]:g}", *cells])
    base = ", ".join(f"{name} {value:g}" for name, value in results["base"].items())
    return [head, *rows], made(results, work(results), f"base point: {base}")


def halting_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of rows that stop at unlike times."""
    head = ["stop times", "mean", "time / time of all at the mean", "thinking alone", "all at 16 / all at the mean"]
    names = ("against_the_mean", "against_the_mean_thinking", "maximum_against_the_mean")
    rows = [
        [point["stop_times"], f"{point['mean_loops']['median']:.2f}", *(wide(point[name], 2) for name in names)]
        for point in results["points"]
    ]
    asked = f"{results['questions']} questions of {results['length']} tokens, batch {results['batch_size']}"
    return [head, *rows], made(results, work(results), asked)


def compiled_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of compiled passes."""
    head = ["method", "batch", "first call, s", "plain, ms", "compiled, ms", "times as fast"]
    rows = [
        [
            point["method"],
            str(point["batch_size"]),
            f"{point['first_call_s']:.0f}",
            *(wide(point["ms"][side]) for side in ("plain", "compiled")),
            wide(point["faster"], 2),
        ]
        for point in results["points"]
    ]
    return [head, *rows], made(results, work(results), f"questions of {results['length']} tokens")


def packed_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of packed weights against plain ones."""
    head = ["model", "method", "batch", "plain, ms", "packed, ms", "times as fast", "of which packing, ms"]
    rows = [
        [
            f"`{point['shape']}`",
            point["method"],
            str(point["batch_size"]),
            *(wide(point["ms"][side]) for side in ("plain", "packed")),
            wide(point["faster"], 2),
            wide(point["ms"]["packing"]),
        ]
        for point in results["points"]
    ]
    return [head, *rows], made(results, f"{results['repeats']} turns; questions of {results['question_tokens']} tokens")


def peers_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of answering in text against what people would run instead."""
    head = ["rows", "batch", "questions", "tokens each", "rival", "CPU time of rival / engine", "wall time"]
    rows = [
        [
            f"end {job['rows']}",
            str(job["batch_size"]),
            str(job["questions"]),
            f"{job['tokens']['mean']:.0f} ({job['tokens']['least']} to {job['tokens']['most']})",
            f"`{side}`",
            wide(job["times_less_cpu"][side], 2),
            wide(job["times_less_wall"][side], 2),
        ]
        for job in results["jobs"]
        for side in job["times_less_cpu"]
    ]
    work = f"{results['model']}, questions of {results['question_tokens']} tokens, {results['repeats']} turns"
    return [head, *rows], made(results, work)


def startup_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what commands cost before they have done anything."""
    head = ["command", "CPU, s", "wall, s", "peak, MiB", "imports", "CPU, times the imports of its model"]
    rows = [
        [
            name if (name := point["command"]).startswith(("python", "a ")) else f"`innerloop {name}`",
            *(wide(point[measure], digits) for measure, digits in (("cpu_s", 2), ("wall_s", 2), ("peak_mib", 0))),
            ", ".join(point["imports"]) or "neither",
            wide(point["times_cpu"], 2) if point["command"] == "ask" else "",
        ]
        for point in results["points"]
    ]
    return [head, *rows], made(results, f"{results['repeats']} turns; a run of the shape `{results['shape']}`")


def thought_pass_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of one thought pass against its memory floor."""
    found = results["thought_pass"]
    head = ["passes", "ms", "times the floor"]
    rows = [[side, wide(found["ms"][side], 2), wide(found["against_floor"][side], 2)] for side in ("plain", "compiled")]
    told = f"one row, {found['new_columns']} latents after {results['length']} tokens"
    return [head, *rows], made(results, work(results), told, f"the floor is {found['floor_ms']:.2f} ms")


def measuring_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what measuring costs: parts of a kind together, from the cheapest to the dearest of them."""
    head = ["what is measured", "parts", "time / plain evaluation", "passes", "positions", "above 2 because"]
    rows = []
    for kind in dict.fromkeys(point["kind"] for point in results["points"]):
        own = [point for point in results["points"] if point["kind"] == kind]
        times = sorted(point["seconds"]["median"] for point in own)
        sides = [[point[name] for point in own] for name in ("passes", "positions")]
        shown = [f"{times[0]:.2f}" + (f" to {times[-1]:.2f}" if len(own) > 1 else "")]
        shown += [f"{sum(side) / len(side):.2f}" for side in sides]
        rows.append([kind, str(len(own)), *shown, DEAR.get(kind, "") if times[-1] > 2 else ""])
    facts = [
        f"SLR of {results['latents']} latents and {results['loops']} loops, width {results['shape']['hidden_size']}",
        f"{results['rows']} rows, batch {results['batch_size']}, {results['repeats']} turns",
        f"a plain evaluation takes {results['base']['seconds']['median']:.2f} s",
    ]
    note = made(results, *facts).replace("median (p10 to p90)", "medians over turns, the lowest to the highest part")
    return [head, *rows], note


def soak_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of the soak test."""
    part = "rss" if all(p["memory"]["cuda"]["at_end_mib"] == 0 for p in results["points"]) else "cuda"
    head = ["method", "answered, in order", "after warm-up, MiB", "at the end, MiB", "growth, MiB per 1000 requests"]
    rows = []
    for point in results["points"]:
        held = point["memory"][part]
        sizes = [f"{held[name]:.1f}" for name in ("after_warm_up_mib", "at_end_mib")]
        rows.append([f"`{point['method']}`", str(point["answered"]), *sizes, f"{held['growth_mib_per_1000']:.3f}"])
    what = f"questions of 2 to {results['longest']} tokens"
    if results.get("too_long"):
        what += f"; {results['points'][0]['failed']} more were too long for the model, and each failed alone"
    return [head, *rows], made(results, what)


def serve_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of requests over HTTP beside `generate`, and beside transformers' server where it was asked."""
    head = [
        "method",
        "`generate`, requests/s",
        "the engine, one by one",
        "over HTTP",
        "share",
        "first token, ms: p50",
        "p99",
        "whole answer: p50",
        "p99",
    ]
    rows = []
    for point in results["points"]:
        both = [f"{point[name]['p' + q]:.0f}" for name in ("first_ms", "whole_ms") for q in ("50", "99")]
        speeds = [f"{point[name + '_per_s']:.1f}" for name in ("generate", "engine", "http")]
        speeds.append(f"{point['ratio']:.2f}")
        rows.append([f"`{point['method']}`", *speeds, *both])
        if peer := point.get("transformers"):
            both = [f"{peer[name]['p' + q]:.0f}" for name in ("first_ms", "whole_ms") for q in ("50", "99")]
            rows.append([f"`{point['method']}` by `transformers serve`", "", "", f"{peer['per_s']:.1f}", "", *both])
    held = results["memory"]
    ties = held["ties"] + sum(point["ties"] for point in results["points"])
    what = (
        f"{results['clients']} clients; {results['n_tokens']} tokens an answer; all answers are those of `generate`, "
    )
    what += f"{ties} of them of `generate` among other questions (ties in the last bits); "
    what += f"{results['requests']} requests of a tiny model: {held['mib'][-1]:.0f} MiB in the end, "
    return [head, *rows], made(results, f"{what}{held['growth_mib']:+.1f} MiB since a quarter of them")


def replica_lines(results: dict) -> tuple[Lines, str]:
    """Return a calculation: what several replicas would answer and hold, were each the one that was measured."""
    head = ["replicas", "cores", "method", "rows/s", "GFLOP/s", "GiB"]
    rows = []
    for n in (1, 2, 4, 8, 16):
        for point in results["points"]:
            per_s = n * point["http_per_s"]
            sizes = f"{per_s:.0f}", f"{per_s * point['flops'] / 1e9:.1f}", f"{n * point['mib'] / 1024:.1f}"
            rows.append([str(n), str(n * results["threads"]), f"`{point['method']}`", *sizes])
    what = "calculated: rows per second and memory measured of one, times replicas; FLOPs of a row by the cost model"
    return [head, *rows], made(results, what)


def shared_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what sharing the beginnings of questions saves."""
    head = ["method", "shared tokens", "rows", "read once, ms", "read for each, ms", "times as fast"]
    rows = [
        [f"`{p['method']}`", str(p["shared"]), str(p["rows"]), wide(p["ms"]), wide(p["each_ms"]), wide(p["speedup"], 2)]
        for p in results["points"]
    ]
    what = (
        f"model `{results['shape']['name']}`, {results['repeats']} turns; {results['own_tokens']} tokens of their own"
    )
    return [head, *rows], made(results, f"{what}, {results['answer_tokens']} written")


def rollout_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what rollouts of a batch save, and of their share of a training step."""
    head = [
        "method",
        "tokens / s",
        "one by one, tokens / s",
        "times as fast",
        "rows with the same tokens",
        "replay, ms",
    ]
    rows = [
        [
            f"`{p['method']}`",
            wide(p["tokens_per_second"]),
            wide(p["alone_tokens_per_second"]),
            wide(p["speedup"], 2),
            f"{p['same_rows']} of {p['rows']} (as timed: {p['same_rows_as_timed']})",
            wide(p["replay_ms"]),
            wide(p["rollout_share"], 2),
        ]
        for p in results["points"]
    ]
    what = f"model `{results['shape']['name']}`, {results['repeats']} turns; {results['questions']} questions of "
    what += f"{results['question_tokens']} tokens with {results['samples']} samples each of at most "
    return [[*head, "rollout / (rollout + replay)"], *rows], made(
        results, f"{what}{results['answer_tokens']}, batch 64"
    )


def control_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what latents beside written tokens are worth, and of how long reinforcement took."""
    head = [
        "variant",
        "fed",
        "accuracy by seed",
        "p against as trained",
        "training, s",
        "rollouts' share",
        "latents' share",
    ]
    rows, fed = [], {"none": "as trained", "shut": "tokens alone", "argmax": "the likeliest token", "swap": "another's"}
    for key in dict.fromkeys((p["variant"], p.get("control", "")) for p in results["points"]):
        found = [p for p in results["points"] if (p["variant"], p.get("control", "")) == key]
        first = key[1] in ("", "none")
        rows.append(
            [
                key[0],
                fed.get(key[1], "as trained"),
                ", ".join(f"{100 * p['accuracy']:.1f}" for p in found) if "accuracy" in found[0] else "",
                "" if first else ", ".join(f"{p['p']:.2g}" for p in found),
                ", ".join(f"{p['seconds']:.0f}" for p in found) if first else "",
                f"{statistics.mean(p['rollout_share'] for p in found):.0%}" if "rollout_share" in found[0] else "",
                " to ".join(f"{statistics.mean(p['hidden_ratio'][i] for p in found):.2f}" for i in (0, 1))
                if first and "hidden_ratio" in found[0]
                else "",
            ]
        )
    n = next(p["n"] for p in results["points"] if "n" in p)
    return [head, *rows], made(results, f"n = {n} test questions, seeds in order; p of McNemar's test, seed by seed")


def loss_memory_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what logits cost a training step."""
    head = ["rows of logits at a time", "peak MiB", "ms", "time / time of all at once", "gradients differ by"]
    rows = [
        [
            "all" if p["loss_chunk"] is None else str(p["loss_chunk"]),
            f"{p['peak_mib']:.1f}",
            wide(p["ms"]),
            wide(p["time_against_whole"], 2),
            f"{p['gradients']['relative_gap']:.1e}",
        ]
        for p in results["points"]
    ]
    n, n_words = results["supervised_tokens"], results["shape"]["vocab_size"]
    what = f"{n} supervised tokens, vocabulary of {n_words}: all logits take {results['logits_mib']:.0f} MiB"
    return [head, *rows], made(results, f"{what}; {results['repeats']} turns")


def breakdown_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of where time goes."""
    parts = results["parts"]
    head = ["method", "batch", "ms", *parts]
    rows = [
        [p["method"], str(p["batch_size"]), wide(p["ms"]), *(f"{p['shares'][part]:.0%}" for part in parts)]
        for p in results["points"]
    ]
    return [head, *rows], made(results, f"model `{results['shape']['name']}`")


def loss_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what training did to the loss."""
    rows = [
        [p["variant"], str(p["steps"]), f"{p['first']:.3f}", f"{p['last']:.3f}", f"{p['largest']:.3f}"]
        for p in results["points"]
    ]
    seeds = ", ".join(map(str, sorted({p["seed"] for p in results["points"]})))
    versions = results["versions"]
    note = f"seed {seeds}; {results['device']}; torch {versions['torch']}, transformers {versions['transformers']}; "
    return [["variant", "steps", "loss, first four", "last four", "largest"], *rows], note


def adaptive_lines(results: dict, unit: str = "loops") -> tuple[Lines, str]:
    """Return the lines of rows that may stop by themselves: a seed each, and what each number of operations takes."""
    sizes = sorted(results["points"][0]["by_operations"])
    head = ["seed", f"all {unit}", "stopped", unit, *(f"{n} operations: {unit}" for n in sizes), "FLOPs saved"]
    rows = []
    for point in results["points"]:
        full, stopped = point["fixed"][max(point["fixed"], key=int)], point["stopped"]
        by = point["by_operations"]
        rows.append(
            [
                str(point["seed"]),
                f"{full['accuracy']:.1%} in {full[unit]:.0f}",
                f"{stopped['accuracy']:.1%}",
                f"{stopped[unit]:.2f}",
                *(f"{by[n][unit]:.2f}" for n in sizes),
                f"{1 - stopped['flops'] / full['flops']:.0%}",
            ]
        )
    versions = results["versions"]
    note = f"{results['device']}; torch {versions['torch']}, transformers {versions['transformers']}; "
    return [head, *rows], note


def fixed_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of fixed numbers of latents beside those that questions choose: a seed each, then FLOPs."""
    fixed = [list(point["fixed"].values()) for point in results["points"]]
    head = ["seed", *(f"{one['latents']:.0f} latents" for one in fixed[0]), "chosen"]
    own = [[*every, point["stopped"]] for every, point in zip(fixed, results["points"])]
    rows = [
        [str(point["seed"]), *(f"{one['accuracy']:.1%}" for one in every)]
        for point, every in zip(results["points"], own)
    ]
    rows.append(["MFLOPs", *(f"{sum(one['flops'] for one in mark) / len(mark) / 1e6:.2f}" for mark in zip(*own))])
    return [head, *rows], adaptive_lines(results)[1]


def holding_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of why loops hold: a variant and a number of loops each, means over seeds."""
    shown = {"accuracy": "{:.1%}", "accuracy_from_anywhere": "{:.1%}", "at_rest": "{:.1%}", "change": "{:.1e}"}
    shown |= {"gain": "{:.2f}", "moved": "{:.2f}", "distance": "{:.1e}", "alignment": "{:.2f}"}
    head = ["variant", "loops", "accuracy", "from a random start", "at rest", *list(shown)[3:]]
    rows = []
    for name in dict.fromkeys(point["variant"] for point in results["points"]):
        own = [point["loops"] for point in results["points"] if point["variant"] == name]
        for t in own[0]:
            means = [form.format(sum(at[t][key] for at in own) / len(own)) for key, form in shown.items()]
            rows.append([name, t, *means])
    seeds = sorted({point["seed"] for point in results["points"]})
    note = f"accuracy: n = {results['points'][0]['n']}; states: n = {results['n_states']}; gain: n = 32; "
    return [head, *rows], f"{note}seeds {', '.join(map(str, seeds))}; {results['device']}; "


def length_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of answering until converged: a variant each, by length; means over seeds."""
    lengths = list(results["points"][0]["n"])
    rows = []
    for name in dict.fromkeys(point["variant"] for point in results["points"] if "converged" in point):
        own = [point for point in results["points"] if point["variant"] == name]
        best = [[max(at[n] for at in point["loops"].values()) for point in own] for n in lengths]
        ended = [[point["converged"][n] for point in own] for n in lengths]
        for what, cells in (
            ("until converged", [f"{sum(at['accuracy'] for at in found) / len(own):.1%}" for found in ended]),
            ("loops until then", [f"{sum(at['loops'] for at in found) / len(own):.1f}" for found in ended]),
            ("best number of loops, seen afterwards", [f"{sum(found) / len(own):.1%}" for found in best]),
        ):
            rows.append([name, what, *cells])
    seeds = sorted({point["seed"] for point in results["points"]})
    note = f"n = {max(results['points'][0]['n'].values())} {results['split']} questions of each length at most; "
    note += f"trained on up to {results['trained']} swaps; seeds {', '.join(map(str, seeds))}; {results['device']}; "
    return [["variant", "", *(f"{n} swaps" for n in lengths)], *rows], note


def switch_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of which steps were latent: a variant each."""
    head = ["variant", "accuracy", "95 % interval", "thought tokens", "passes", "MFLOPs", "latent steps"]
    head += ["of one operation", "of two"]
    rows = [
        [
            row["variant"],
            f"{row['accuracy']:.1%}",
            "-" if row["half"] is None else f"± {100 * row['half']:.1f}",
            f"{row['thought_tokens']:.1f}",
            f"{row['passes']:.1f}",
            f"{row['flops'] / 1e6:.2f}",
            *("-" if row[f"latent_{n}"] is None else f"{row[f'latent_{n}']:.0%}" for n in ("all", "1", "2")),
        ]
        for row in results["variants"]
    ]
    seeds, versions = sorted({point["seed"] for point in results["points"]}), results["versions"]
    note = f"n = {results['n']} test questions, seeds {', '.join(map(str, seeds))}; {results['device']}; "
    return [head, *rows], note + f"torch {versions['torch']}, transformers {versions['transformers']}; "


def denoise_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of rules that fill canvases: a rule each."""
    rows = [
        [
            point["rule"],
            f"{point['accuracy']:.1%}",
            f"{point['ci95'][0]:.1%} to {point['ci95'][1]:.1%}",
            f"{point['passes']:.1f}",
            f"{results['gen_length'] / point['passes']:.1f}",
            f"{point['positions']:.0f}",
        ]
        for point in results["points"]
    ]
    versions = results["versions"]
    note = f"n = {results['n']} test questions, seed {results['seed']}; {results['device']}; "
    note += f"torch {versions['torch']}, transformers {versions['transformers']}; "
    return [["rule", "accuracy", "95 % interval", "passes", "tokens a pass", "positions"], *rows], note


def start_lines(results: dict) -> tuple[Lines, str]:
    """Return the lines of what mask predictors start from: the held-out loss by the number of steps."""
    steps = list(results["points"][0]["losses"])
    rows = [[point["start"], *(f"{point['losses'][step]:.3f}" for step in steps)] for point in results["points"]]
    versions = results["versions"]
    note = f"{results['n']} held-out chunks of {results['n_words']} words, batches of {results['batch_size']}, "
    note += f"seed {results['seed']}; {results['device']}; "
    note += f"torch {versions['torch']}, transformers {versions['transformers']}; "
    return [["start", *(f"step {step}" for step in steps)], *rows], note


def family_lines(results: dict, chosen: Callable[[dict], bool], abilities: bool) -> tuple[Lines, str]:
    """Return the lines of some families of decoders: what each can, or why it is refused."""
    names = {"text": "text", "latents": "latents", "trains": "training", "loops": "loops in the token"}
    rows = [one for one in results["families"] if chosen(one)]
    marks = [[("yes" if name in one["can"] else "no") for name in names] if abilities else [] for one in rows]
    lines = [[f"`{one['family']}`", *marked, one["why"].replace("|", "/")] for one, marked in zip(rows, marks)]
    versions = results["versions"]
    note = f"{len(rows)} families; torch {versions['torch']}, transformers {versions['transformers']}; "
    return [["family", *(names.values() if abilities else ()), "why not"], *lines], note


KINDS: dict[tuple[str, str], Callable[[dict], tuple[Lines, str]]] = {
    ("losses", ""): loss_lines,
    ("adaptive_loops", ""): adaptive_lines,
    ("adaptive_loops", "latents"): lambda results: adaptive_lines(results, "latents"),
    ("adaptive_loops", "fixed"): fixed_lines,
    ("loop_holding", ""): holding_lines,
    ("loops_and_length", ""): length_lines,
    ("step_switch", ""): switch_lines,
    ("denoise", ""): denoise_lines,
    ("denoise_start", ""): start_lines,
    ("bench", ""): bench_lines,
    ("engine", "reference"): reference_lines,
    ("engine", "bare"): bare_lines,
    ("latent_against_text", ""): latent_lines,
    ("training", ""): training_lines,
    ("scaling", ""): scaling_lines,
    ("halting", ""): halting_lines,
    ("measuring", ""): measuring_lines,
    ("soak", ""): soak_lines,
    ("serve", ""): serve_lines,
    ("serve", "replicas"): replica_lines,
    ("compiled", ""): compiled_lines,
    ("packed", ""): packed_lines,
    ("peers", ""): peers_lines,
    ("startup", ""): startup_lines,
    ("compiled", "pass"): thought_pass_lines,
    ("shared_prefix", ""): shared_lines,
    ("rollouts", ""): rollout_lines,
    ("rl_controls", ""): control_lines,
    ("loss_memory", ""): loss_memory_lines,
    ("breakdown", ""): breakdown_lines,
    ("families", "supported"): lambda results: family_lines(results, lambda one: "loads" in one["can"], True),
    ("families", "refused"): lambda results: family_lines(
        results, lambda one: not one["can"] and not one.get("not_tried"), False
    ),
    ("families", "untried"): lambda results: family_lines(results, lambda one: bool(one.get("not_tried")), False),
}


if __name__ == "__main__":
    main()
