"""ReMDM (arXiv 2503.00307): tokens may be masked again while a canvas is filled, so that errors can be mended.

Of a step from time t to s, with alpha the share of tokens that are no masks:

    a token  is masked again with sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t)
    a mask   stays with ((1 - alpha_s) - sigma alpha_t) / (1 - alpha_t)

so the share of masks is that of MDLM, which is sigma = 0. Only the sampler changes; nothing is trained for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Chance, Share
from innerloop.errors import refuse

if TYPE_CHECKING:  # slow to import
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RemaskSettings(Checked):
    """When tokens are masked again, and how likely: sigma = rescale min(cap, sigma_max).

    Args:
        cap: eta_cap; 0 is MDLM, in which nothing is masked again.
        rescale: eta_rescale.
        confidence: tokens that were likely when they were committed are masked again less: not so (none), with weights
            whose sum is 1 as the paper has them (sum), or whose mean is 1 (mean).
        when: in all steps (always), from time ``t_switch`` on (switch), or in a loop in which the share of tokens is
            held at ``a_on``, from ``t_on`` to ``t_off`` (loop).
        t_switch: the time at which a switch turns on; time runs from 1 to 0.
        t_on: when the loop begins.
        t_off: when it ends.
        a_on: the share of tokens in the loop.
    """

    cap: Share = 0.05
    rescale: Share = 1.0
    confidence: Literal["none", "sum", "mean"] = "none"
    when: Literal["always", "switch", "loop"] = "always"
    t_switch: Share = 0.5
    t_on: Chance = 0.55
    t_off: Chance = 0.05
    a_on: Chance = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.when == "loop" and self.t_off >= self.t_on,
                "sampler.remask.when=loop ends at t_off, which must be below t_on, as time runs from 1 to 0",
            )
        )

    @property
    def remasks(self) -> bool:
        """Whether any token may be masked again."""
        return self.cap > 0 and self.rescale > 0

    def alphas(self, n_steps: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Return the share of tokens before each step and after the last (T + 1,), and which steps mask again (T,)."""
        import numpy as np

        times = 1 - np.arange(n_steps) / n_steps
        if self.when != "loop":
            on = np.ones(n_steps, dtype=bool) if self.when == "always" else times <= self.t_switch
            return np.arange(n_steps + 1) / n_steps, on
        n_last = max(1, round(self.t_off * n_steps))
        n_first = min(n_steps - n_last, max(1, round((1 - self.t_on) * n_steps))) if n_steps > n_last else 0
        n_loop = n_steps - n_first - n_last
        start = self.a_on if n_first else 0.0
        first = self.a_on * np.arange(1, n_first + 1) / max(n_first, 1)
        last = start + (1 - start) * np.arange(1, n_last + 1) / n_last
        alphas = np.concatenate([[0.0], first, np.full(n_loop, start), last])
        return alphas, np.repeat([False, True, False], [n_first, n_loop, n_last])

    def sigma(self, a_t: float, a_s: float) -> float:
        """Return how likely a token is masked again in a step that masks again."""
        return self.rescale * min(self.cap, sigma_max(a_t, a_s))


def sigma_max(a_t: float, a_s: float) -> float:
    """Return the largest sigma for which no probability is negative."""
    return 1.0 if a_t == 0 else min(1.0, (1 - a_s) / a_t)


def stay(a_t: float, a_s: float, sigma: float) -> float:
    """Return how likely a mask stays one; where there should be none any more, it does not."""
    return 0.0 if a_t >= 1 else min(max(((1 - a_s) - sigma * a_t) / (1 - a_t), 0.0), 1.0)


def weights(likely_G: Floats, is_token_G: NDArray[np.bool_], norm: str) -> Floats:
    """Return by what sigma is multiplied for each token (G,), 0 for masks: exp(-p), p when it was committed."""
    import numpy as np

    raw_G = np.where(is_token_G, np.exp(-np.where(is_token_G, likely_G, 0.0)), 0.0)
    total = raw_G.sum()
    if norm == "none" or total == 0:
        return is_token_G.astype(float)
    return raw_G / total * (is_token_G.sum() if norm == "mean" else 1)
