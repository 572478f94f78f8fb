"""Which policy draws the rollouts of a model, where none is given."""

from __future__ import annotations

from innerloop.config.stopping import GATED
from innerloop.engine.canvas_policies import CoinsPolicy, RankingPolicy
from innerloop.engine.canvas_rollouts import P_MASK_PROMPT, OnePassPolicy
from innerloop.engine.rollouts import Policy, WritingPolicy
from innerloop.engine.stopping_rollouts import StoppingPolicy
from innerloop.errors import refuse
from innerloop.methods.denoise.dcolt import Dcolt
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.model.model import LatentCore
from innerloop.train.grpo_arguments import GrpoArguments


def policy_for(model: LatentCore, args: GrpoArguments) -> Policy:
    """Return the policy of a model's method."""
    method, share = model.method, args.p_mask_prompt
    is_learned = isinstance(method, DenoisingMethod) and method.sampler.commit == "learned"
    is_estimated = isinstance(method, DenoisingMethod) and not is_learned
    refuse(
        (
            share is not None and not is_estimated,
            f"p_mask_prompt is of canvases whose likelihood is estimated, and that of what '{method.name}' writes is "
            "known: leave it out",
        )
    )
    if is_estimated:
        return OnePassPolicy(model, args.temperature, args.batch_size, P_MASK_PROMPT if share is None else share)
    if isinstance(method, Dcolt) and is_learned:
        return RankingPolicy(model, args.temperature, args.batch_size)
    if is_learned:
        return CoinsPolicy(model, args.temperature, args.batch_size)
    decides = method.stop.rule in GATED  # the numbers of iterations are drawn too
    return (StoppingPolicy if decides else WritingPolicy)(model, args.temperature, args.batch_size)
