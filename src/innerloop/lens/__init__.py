"""Looking inside: what a model held in its loop for some examples, as plain data (`look`) and as one page."""

from innerloop.lens.grid import Cell, Column, Line, Loop
from innerloop.lens.latents import Step, Stop
from innerloop.lens.page import page_of, page_path, write_page
from innerloop.lens.record import Look, Record, look
from innerloop.lens.terminal import terminal_view

__all__ = [
    "Cell",
    "Column",
    "Line",
    "Look",
    "Loop",
    "Record",
    "Step",
    "Stop",
    "look",
    "page_of",
    "page_path",
    "terminal_view",
    "write_page",
]
