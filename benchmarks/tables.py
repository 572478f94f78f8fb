"""Write the tables of docs/ and README from the results beside this file, so that no number is typed by hand.

python benchmarks/tables.py            # a test fails where a page differs from what this would write

A page has, around each table, <!-- table: FILE.json [loops] --> and <!-- end -->. FILE.json is in benchmarks/results
and was written by `innerloop compare SUITE --results`; with `loops` the columns are numbers of iterations.
"""

import json
import math
import re
from pathlib import Path

from innerloop.suite import seed_means

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\S+)( loops)? -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))


def filled(text: str) -> str:
    """Return a page with its tables written anew."""
    return TABLE.sub(lambda m: f"{m[1]}{table(ROOT / 'benchmarks' / 'results' / m[2], bool(m[3]))}{m[4]}", text)


def table(path: Path, by_loops: bool) -> str:
    """Return one suite's table in Markdown, with where its numbers come from."""
    results = json.loads(path.read_text())
    means = seed_means(results["points"])
    seeds = sorted({point["seed"] for point in results["points"]})
    if by_loops:
        loops = list(next(row["loops"] for row in means if row["loops"]))
        head = ["variant", *(f"{n} loops" for n in loops)]
        rows = [[row["variant"], *(f"{100 * row['loops'][n]:.1f}" for n in loops)] for row in means if row["loops"]]
    else:
        head = ["variant", "accuracy", "95 % interval", "by seed", "passes", "positions", "thought", "MFLOPs"]
        rows = [
            [
                row["variant"],
                f"{100 * row['accuracy']:.1f} %",
                "-" if math.isinf(row["half"]) else f"± {100 * row['half']:.1f}",
                ", ".join(f"{100 * value:.1f}" for value in row["accuracies"]),
                f"{row['passes']:.1f}",
                f"{row['positions']:.1f}",
                f"{row['thought_tokens']:.1f}",
                f"{row['flops'] / 1e6:.2f}",
            ]
            for row in means
        ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    failed = [f"{p['variant']} seed {p['seed']}" for p in results["points"] if "error" in p]
    note = (
        f"n = {results['n']} {results['split']} questions, seeds {', '.join(map(str, seeds))}, {results['device']}, "
        f"torch {results['versions']['torch']}, transformers {results['versions']['transformers']}; "
        + (f"failed: {', '.join(failed)}; " if failed else "")
        + f"[{path.name}](../benchmarks/results/{path.name})"
    )
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main()
