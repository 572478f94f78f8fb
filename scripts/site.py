"""Where the pages of the documentation site come from, as a hook of MkDocs (mkdocs.yml).

Pages keep the paths that they have in the repository, so links between them work on the site as they do there; only
their addresses leave out ``docs/``. Scripts and the notebook of ``examples/`` become pages of their own.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ALONE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "pyproject.toml")
FOLDERS = ("docs", "recipes", "examples", "benchmarks/results")
KINDS = (".md", ".css", ".png", ".svg", ".json", ".yaml", ".py", ".ipynb")


class Markers(Extension):
    """Leaves ``<bot>`` and the like in running text as they are, which are no HTML."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Take inline HTML out."""
        md.inlinePatterns.deregister("html")


def on_config(config: MkDocsConfig) -> None:
    """Add what reads markers as text."""
    config.markdown_extensions.append(Markers())  # type: ignore[arg-type]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what MkDocs found in docs/ by the files of the repository that pages link to."""
    theme = [file for file in files if file.abs_src_path is None or not Path(file.abs_src_path).is_relative_to(ROOT)]
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in KINDS]
    found = [_file(path, config) for path in [*(ROOT / name for name in ALONE), *inside]]
    examples = sorted((ROOT / "examples").glob("*.py")) + sorted((ROOT / "examples").glob("*.ipynb"))
    return Files([*theme, *found, *(_example(path, config) for path in examples)])


def _file(path: Path, config: MkDocsConfig) -> File:
    file = File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file


def _example(path: Path, config: MkDocsConfig) -> File:
    text = _of_notebook(path) if path.suffix == ".ipynb" else _of_script(path)
    return File.generated(config, f"examples/{path.stem}.md", content=text)


def _of_script(path: Path) -> str:
    """Return a script as a page: its docstring as text, the rest as code."""
    source = path.read_text()
    tree = ast.parse(source)
    code = "\n".join(source.splitlines()[tree.body[0].end_lineno or 0 :]).strip()
    title, _, told = (ast.get_docstring(tree) or "").partition("\n")
    return f"# {path.name}\n\n{title}\n{told}\n\n```python\n{code}\n```\n"


def _of_notebook(path: Path) -> str:
    """Return a notebook as a page: its text as it is, its code, and what that printed."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(line for output in cell.get("outputs", ()) for line in output["text"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
