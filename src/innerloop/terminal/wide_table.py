"""Tables for a terminal that are cut into bands where they are wider than it, so that no cell is ever cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

Column = tuple[str, Sequence[str]]
"""A name and its cells."""


@dataclass(frozen=True)
class Bands:
    """A table in bands.

    Attributes:
        title: above the first band.
        columns: the first is repeated in every band.
        numbers: the names of the columns that hold numbers.
        note: below the last band.
    """

    title: str
    columns: Sequence[Column]
    numbers: Collection[str] = ()
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        title: str | None = self.title
        for band in self.bands(options.max_width):
            table = Table(title=title, title_justify="left")
            for name, _ in band:
                table.add_column(Text(name), justify="right" if name in self.numbers else "left", overflow="fold")
            for line in zip(*(cells for _, cells in band)):
                table.add_row(*map(Text, line))
            yield table
            title = None
        if self.note:
            yield Text(self.note, style="dim")

    def bands(self, width: int) -> Iterator[list[Column]]:
        """Share the columns out to bands that fit a width; each has at least one column besides the first."""
        first, *rest = self.columns
        band, used = [first], 1 + _drawn_width(first)
        for column in rest:
            if len(band) > 1 and used + _drawn_width(column) > width:
                yield band
                band, used = [first], 1 + _drawn_width(first)
            band.append(column)
            used += _drawn_width(column)
        yield band


def _drawn_width(column: Column) -> int:
    """Return how many characters a column takes with its padding and one border."""
    name, cells = column
    return max(cell_len(line) for cell in (name, *cells) for line in cell.split("\n")) + 3
