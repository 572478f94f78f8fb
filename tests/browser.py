"""A browser that opens pages: what it prints, draws, and says on its console."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PHONE = 390  # pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=5000"""
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed")


def browse(page: str, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """Open a page; return what the browser prints and the lines of its console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    return visit((folder / "page.html").resolve().as_uri(), folder, *flags)


def visit(address: str, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """Open an address; return what the browser prints and the lines of its console."""
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def screenshot(page: str, folder: Path, *flags: str) -> tuple[int, list[str]]:
    """Open a page; return the size of its picture in bytes, and the lines of its console."""
    _, console = browse(page, folder, f"--screenshot={folder / 'shot.png'}", "--window-size=1000,1400", *flags)
    return (folder / "shot.png").stat().st_size, console


def width_on_a_phone(page: str, folder: Path) -> int:
    """Return how many pixels a page takes where it is shown on 390; windows are never so narrow, but frames are."""
    tell = """<script>addEventListener("load", () => setTimeout(
        () => parent.postMessage(document.documentElement.scrollWidth, "*"), 500))</script></body>"""
    inner = html.escape(page.replace("</body>", tell), quote=True)
    outer = f"""<!doctype html><iframe width={PHONE} height=800 style="border: 0" srcdoc="{inner}"></iframe><pre></pre>
        <script>addEventListener("message", (e) => document.querySelector("pre").textContent = e.data)</script>"""
    shown, _ = browse(outer, folder, "--dump-dom")
    return int(re.findall(r"<pre>(\d+)</pre>", shown)[-1])
