"""`Onlooker`: a module that looks at others without owning them, so that their weights are not counted as its own."""

from typing import Any

from torch import nn


class Onlooker(nn.Module):
    """A module with others beside it: they are attributes, but neither moved, trained nor saved with it."""

    def look_at(self, **others: Any) -> None:
        """Set others that are looked at, by name."""
        for name, other in others.items():
            object.__setattr__(self, name, other)
