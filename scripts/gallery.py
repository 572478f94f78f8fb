"""Make the pictures of docs/gallery: the lens's page of some runs, and pages that are there, as Chromium draws them.

    python scripts/gallery.py runs/chain-lotus runs/chain-mor runs/suites/chain-all/report.html --out docs/gallery

Each run gives lens_METHOD.png, each page NAME.png; with --dark NAME_dark.png. It takes a browser, such as chromium.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from innerloop.cli import main as cli
from innerloop.model import run_folder

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ("--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
DARK = "--blink-settings=preferredColorScheme=0"
MOST_BYTES = 200_000


def picture(page: Path, target: Path, size: str, dark: bool, flags: list[str]) -> None:
    """Draw a page in a window of WIDTH,HEIGHT into a PNG."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        own = [f"--user-data-dir={profile}", "--hide-scrollbars", "--virtual-time-budget=5000", f"--window-size={size}"]
        theme = [DARK] if dark else []
        command = [
            browser,
            *QUIET,
            *own,
            *theme,
            *flags,
            f"--screenshot={target.resolve()}",
            f"file://{page.resolve()}",
        ]
        subprocess.run(command, check=True, capture_output=True)
    if (n_bytes := target.stat().st_size) > MOST_BYTES:
        sys.exit(
            f"{target} has {n_bytes} bytes, more than the {MOST_BYTES} a picture here may have: choose a smaller --size"
        )
    print(target)


def main() -> None:
    """Make one picture for each run or page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or .html files")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"))
    parser.add_argument("--size", default="1200,1300", help="of the window, WIDTH,HEIGHT")
    parser.add_argument("--dark", action="store_true", help="the dark theme")
    parser.add_argument(
        "--flag", action="append", default=[], help="another flag for the browser, as --flag=--no-sandbox"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            page, name = Path(run), Path(run).stem
            if page.suffix != ".html":
                method = run_folder.read_settings(Path(run_folder.resolve(run)))["method"]["name"]
                page, name = Path(folder) / "lens.html", f"lens_{method}"
                if cli.main(["lens", run, "--out", str(page)]) != 0:
                    sys.exit(1)
            target = arguments.out / f"{name}{'_dark' if arguments.dark else ''}.png"
            picture(page, target, arguments.size, arguments.dark, arguments.flag)


if __name__ == "__main__":
    main()
