"""Sentences of text with LaTeX in it, in one walk from its end and one from its beginning: the time is linear.

A sentence ends before a space, after . ? or ! outside mathematics or just within its end, or at a blank line.
"""

import re
from collections.abc import Iterator

BEGIN = re.compile(r"\\begin\{([a-z]+\*?)\}")
END = re.compile(r"\\end\{([a-z]+\*?)\}")
ENDS = tuple(stop + closed for stop in ".?!" for closed in ("", "$", "$$", "\\]"))


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, with one space where it has white space."""
    found = (" ".join(text[start:end].split()) for start, end in _spans(text))
    return [sentence for sentence in found if sentence]


def _spans(text: str) -> Iterator[tuple[int, int]]:
    formulas, blank = _Formulas(text), _blank_ahead(text)
    start = at = 0
    while at < len(text):
        at = formulas.end_of(at)
        stops = at == len(text) or (text[at].isspace() and text.endswith(ENDS, 0, at))
        if stops or (text[at] == "\n" and blank[at + 1]):
            yield start, at
            start = at


def _blank_ahead(text: str) -> list[bool]:
    """Tell for each place whether a line ends there or after white space alone."""
    found = [False] * (len(text) + 1)
    for at in range(len(text) - 1, -1, -1):
        found[at] = text[at] == "\n" or (text[at].isspace() and found[at + 1])
    return found


class _Formulas:
    """Where what begins at a place of a text ends: a formula that is closed later, an escaped sign, or one sign."""

    def __init__(self, text: str):
        self.text = text
        self.last = {closed: text.rfind(closed) for closed in ("$$", "\\]")}
        self.last |= {found.group(): found.start() for found in END.finditer(text)}
        self.dollar = [-1] * (len(text) + 2)  # the next $ that is not escaped, read from each place on
        for at in range(len(text) - 1, -1, -1):
            self.dollar[at] = at if text[at] == "$" else self.dollar[at + (2 if text[at] == "\\" else 1)]

    def end_of(self, at: int) -> int:
        """Return where the formula or sign ends that begins at a place."""
        text = self.text
        if text.startswith("$$", at):
            return self._closed(at + 2, "$$") or at + 1
        if text[at] == "$":
            return self.dollar[at + 1] + 1 or at + 1
        if text[at] != "\\" or at + 1 == len(text):
            return at + 1
        if text[at + 1] == "[":
            return self._closed(at + 2, "\\]") or at + 2
        begins = BEGIN.match(text, at)
        return (begins and self._closed(begins.end(), f"\\end{{{begins[1]}}}")) or at + 2

    def _closed(self, start: int, closed: str) -> int | None:
        """Return where a formula ends that holds at least one sign from ``start`` on, if it is closed."""
        if self.last.get(closed, -1) <= start:
            return None
        return self.text.index(closed, start + 1) + len(closed)
