"""What methods that choose among tokens have in common: how a share is counted, and how a choice is weighed."""

from typing import Literal

Gate = Literal["identity", "sigmoid", "scaled_sigmoid", "st"]
GateTarget = Literal["delta", "full", "replace"]
CapacityBase = Literal["valid", "static"]
