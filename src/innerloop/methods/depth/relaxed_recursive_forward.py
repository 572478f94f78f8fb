"""The passes of relaxed recursive transformers: a looped block with corrections by depth (`relaxed_recursive`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.token_losses import divergence
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.block_loop_forward import LoopedDepth
from innerloop.methods.depth.relaxed_recursive import RelaxedRecursive
from innerloop.methods.depth.residual_lora import GainsAndBiases, ResidualLora
from innerloop.passes.loss_inputs import LossInputs, PassTerms


class RelaxedDepth(LoopedDepth):
    """The looping decoder, whose iterations have corrections, gains and biases of their own."""

    method: RelaxedRecursive

    def __init__(self, method: RelaxedRecursive, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        ranks = method.rank, method.other_rank
        self.lora = ResidualLora(backbone, self.block, method.max_loops, *ranks) if max(ranks) else None
        self.vectors = None if method.tie_1d else GainsAndBiases(backbone, self.block, method.max_loops)

    @contextmanager
    def weights(self, iteration: int) -> Iterator[None]:
        """Run ``iteration`` in the block."""
        with ExitStack() as stack:
            for part in (self.lora, self.vectors):
                if part is not None:
                    stack.enter_context(part.at(iteration))
            yield

    def extra_flops(self, iteration: int) -> float:
        """Return what an iteration costs per token besides its layers."""
        return super().extra_flops(iteration) + (0.0 if self.lora is None else self.lora.flops)

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return what is learned at the exits, and from the original model."""
        terms, batch, thought = super().loss_terms(inputs), inputs.batch, inputs.thought
        if inputs.reference is not None:
            rows, at = batch.predict_at_U // batch.ids_BS.shape[1], batch.predict_at_U % batch.ids_BS.shape[1]
            own_UV = self.backbone.head(thought.answer[-1][rows, at - thought.first_column])
            wanted_UV = inputs.reference.logits(batch)
            terms["kd"] = divergence(wanted_UV, own_UV, self.method.kd.temperature).sum(), "answer"
        return terms
