"""The console that every verb prints to."""

from rich.console import Console


def plain_console() -> Console:
    """Return a console that prints names and texts as they are: nothing in them is markup, and nothing an emoji."""
    return Console(markup=False, emoji=False)
