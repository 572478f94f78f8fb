"""iGSM (arXiv 2407.20311), which is only read."""

from dataclasses import dataclass
from typing import ClassVar

from innerloop.tasks.arithmetic import NumberTask


@dataclass(frozen=True)
class Igsm(NumberTask):
    """iGSM: made-up dependency graphs told as word problems, modulo 23."""

    name: ClassVar[str] = "igsm"
    summary: ClassVar[str] = "made-up word problems over a dependency graph, modulo 23"
    max_new_tokens: ClassVar[int] = 512
