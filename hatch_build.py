"""README as a package page shows it: links into the repository go to its address, or become plain names without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"!?\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")  # to a file of the repository
NOTE = re.compile(r"<!--.*?-->\n?", re.DOTALL)


def for_package_page(text: str, repository: str | None) -> str:
    """Return README's text without notes to its tools, and with links that work away from the repository.

    Args:
        text: README.
        repository: the repository's address; None: links become the text that they show.
    """
    if repository is None:
        return LINK.sub(r"\1", NOTE.sub("", text))
    where = repository.rstrip("/") + "/blob/main/"
    return LINK.sub(lambda link: link[0].replace(f"({link[2]})", f"({where}{link[2]})"), NOTE.sub("", text))


class Readme(MetadataHookInterface):
    """Sets the field ``readme`` of the package's metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the text."""
        text = for_package_page(Path(self.root, "README.md").read_text(), metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
