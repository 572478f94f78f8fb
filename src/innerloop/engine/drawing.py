"""How the next token of each row is chosen: the likeliest, or one that is drawn; each row in its own way.

A row's token depends on its own logits, temperature and numbers alone, so that its company does not matter.

Shapes: `R` rows that write, `V` vocabulary, `N` tokens that a row may write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from innerloop.engine.requests import Request

PerRow = float | Tensor
"""A number of all rows, or of each (R, 1)."""


@dataclass
class Drawing:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        likely_at: the temperature of the log-probabilities that are asked for; None: none are.
        uniforms: numbers in [0, 1) for the tokens that each row may write (R, N), where any are drawn.
        n_alternatives: how many alternatives to each token are told.
    """

    temperature: PerRow = 0.0
    likely_at: PerRow | None = None
    uniforms: Tensor | None = None
    n_alternatives: int = 0

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Drawing:
        """Return how the tokens of requests that have written nothing are chosen."""
        drawing = cls()
        if any(request.options.temperature > 0 for request in requests):
            n = max(request.budget for request in requests)
            drawn = [np.random.default_rng([r.options.seed, *r.draw]).random(n) for r in requests]
            drawing.uniforms = torch.from_numpy(np.stack(drawn)).to(device)
        return drawing.asked_by(requests, device)

    def asked_by(self, requests: Sequence[Request], device: torch.device) -> Drawing:
        """Return how tokens are chosen once the rows, whose numbers are these, are those of ``requests``."""
        options = [request.options for request in requests]
        temperature = _of_each([one.temperature for one in options], device, torch.float64)
        likely = [one.likely_at for one in options]
        is_asked = any(at is not None for at in likely)
        likely_at = _of_each([at or 1.0 for at in likely], device, torch.float32) if is_asked else None
        uniforms = self.uniforms if isinstance(temperature, Tensor) or temperature > 0 else None
        return Drawing(temperature, likely_at, uniforms, max((one.alternatives for one in options), default=0))

    def keep_rows(self, index: Tensor) -> Drawing:
        """Return it with the numbers of some rows; what they ask for `asked_by` says."""
        uniforms = None if self.uniforms is None else self.uniforms[index]
        return Drawing(self.temperature, self.likely_at, uniforms, self.n_alternatives)

    def join(self, other: Drawing, n_own: int, n_others: int) -> Drawing:
        """Return it with the numbers of another's rows behind its own; what they ask for `asked_by` says."""
        if self.uniforms is None and other.uniforms is None:
            return self
        some = self.uniforms if self.uniforms is not None else other.uniforms
        assert some is not None
        both = [
            some.new_zeros(n, 1) if u is None else u for u, n in ((self.uniforms, n_own), (other.uniforms, n_others))
        ]
        width = max(u.shape[1] for u in both)
        return Drawing(uniforms=torch.cat([pad(u, (0, width - u.shape[1])) for u in both]))

    def numbers(self, n_written_R: Tensor) -> Tensor | None:
        """Return the numbers (R,) that draw the next tokens of rows that have written so many."""
        if self.uniforms is None:
            return None
        return self.uniforms.gather(1, n_written_R.clamp(max=self.uniforms.shape[1] - 1)[:, None])[:, 0]


def _of_each(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> PerRow:
    """Return a number that is the same for all, or that of each (R, 1)."""
    if len(set(values)) <= 1:
        return values[0] if values else 0.0
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def without(logits_RV: Tensor, suppressed: Tensor) -> Tensor:
    """Return logits in which some tokens are impossible."""
    return logits_RV.index_fill(1, suppressed, -torch.inf) if len(suppressed) else logits_RV


def choose(logits_RV: Tensor, suppressed: Tensor, temperature: PerRow, drawn_R: Tensor | None) -> Tensor:
    """Return the next token of each row (R,): the likeliest, or at a temperature the one that a number points at.

    ``drawn_R`` are numbers in [0, 1); a row's token is where its cumulative probability passes them, so that it depends
    on nothing but the row.
    """
    logits_RV = without(logits_RV, suppressed)
    is_mixed = isinstance(temperature, Tensor)
    if not is_mixed and temperature == 0:
        return logits_RV.argmax(-1)
    assert drawn_R is not None
    warmth = torch.where(temperature > 0, temperature, 1.0) if isinstance(temperature, Tensor) else temperature
    sums_RV = (logits_RV.double() / warmth).softmax(-1).cumsum(-1)
    ids_R = torch.searchsorted(sums_RV, drawn_R[:, None] * sums_RV[:, -1:], right=True)[:, 0]
    ids_R = ids_R.clamp(max=logits_RV.shape[1] - 1)
    if isinstance(temperature, Tensor):
        return torch.where(temperature[:, 0] > 0, ids_R, logits_RV.argmax(-1))
    return ids_R
