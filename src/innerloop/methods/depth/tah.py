"""Think-at-Hard (arXiv 2511.08577): hard tokens are read once more by the same decoder, with a LoRA, all others once.

    z^1 = P(E[x]);  Z^1 = z^1
    token i goes on from depth d < D if decider(its states, its largest logits Z^d_i) > tau
    e^(d+1) = sum_v p_v E[v] with p = softmax over the top-K of Z^d;  Z^(d+1) = Z^d + P_LoRA(e^(d+1))       (tah.md, 3)

What adds up are the states after the final norm: the head is linear, so it reads the sum of the logits off their sum.
A query at depth d sees earlier tokens at depths up to d (`duo_attention`). While answering, one pass serves
rows at every depth: a row whose token is hard waits for one more pass, and the others write on.

Training has two stages: the model and the LoRA, with depths from an oracle (``iterate: oracle``); then the decider
alone, which learns the oracle's choices (``trains: decider``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedTokenizerBase

from innerloop.checks.settings import Checked
from innerloop.checks.values import Count, Dropout, Positive, SomeLoops, Weight
from innerloop.config.loop import BankKind, LoopSettings
from innerloop.decoder.backbone import Backbone
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.decider import FREE, ONCE, Choice, Chooser, DeciderSettings, Iterate, charge
from innerloop.methods.depth.duo_attention import DepthAttention, DuoCache, Unfinished, read_at
from innerloop.methods.depth.method import DepthMethod
from innerloop.methods.depth.prune import N_ROWS, prune_layer
from innerloop.methods.depth.token_labels import Oracle, OracleSettings, hashes
from innerloop.passes.loss_inputs import LossInputs, PassTerms, Reference
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput, Tokens
from innerloop.text.batch import Batch
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import read_examples


@dataclass(frozen=True)
class ReadingLora(Checked):
    """The LoRA of readings after the first, on all attention and MLP linears.

    Args:
        kind: one update for all readings after the first (shared), one for each (per_iter), or none.
        rank: r.
        gamma: the update is scaled by gamma / r.
        dropout: of its input, in training.
    """

    kind: BankKind = "shared"
    rank: int = 16
    gamma: float = 32.0
    dropout: Dropout = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (self.rank < 1, "lora.rank must be at least 1; to do without, set lora.kind to none"),
        )


@dataclass(frozen=True)
class ReadingLoop(LoopSettings):
    """Iterations have nothing but low-rank updates."""

    lora: BankKind = "none"
    lora_rank: int = 8
    lora_gamma: float = 16.0


@dataclass(frozen=True)
class Tah(DepthMethod):
    """Think-at-Hard.

    Args:
        max_loops: D, the most times that a token is read; 1 is the plain decoder.
        trains: the model and the LoRA (model), or nothing but the decider, on the oracle's labels (decider).
        iterate: who says which tokens go on: the decider; the oracle, in training (when answering then none does);
            always or never.
        tau: a token goes on if the decider is surer than this.
        input_mix_topk: K, words mixed into the input of the next reading, and logits that the decider looks at.
        prompt_iterates: whether tokens of the question may go on, too, as in the authors' code; they have no labels,
            where theirs are easy.
        force_one: in training, let one token of a batch iterate where the oracle wants none: the LoRA has a gradient.
        pos_weight: weight of hard tokens in the decider's loss: easy ones for each hard one. That is a mean over all
            decisions; the authors' a sum of the means at each depth.
        residual_logits: add up the logits of all readings; off: the last alone.
        depth_attention: a token read again sees all depths up to its own (duo), the first (depth1_only), or its own.
        prune_rows: of a pretrained model one layer is deleted, to make room for LoRA and decider: file of examples on
            which it is measured which is missed least.
    """

    name: ClassVar[str] = "tah"
    paper: ClassVar[str] = "arXiv 2511.08577"
    summary: ClassVar[str] = "hard tokens are read twice, by the same model with a LoRA; a decider says which"

    max_loops: SomeLoops = 2
    trains: Literal["model", "decider"] = "model"
    iterate: Iterate = "decider"
    tau: Weight = 0.9
    input_mix_topk: Count = 100
    prompt_iterates: bool = False
    force_one: bool = True
    pos_weight: Positive = 4.8
    residual_logits: bool = True
    depth_attention: DepthAttention = "duo"
    prune_rows: str | None = None
    lora: ReadingLora = ReadingLora()
    decider: DeciderSettings = DeciderSettings()
    oracle: OracleSettings = OracleSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        learns_labels = self.iterate == "oracle" or self.trains == "decider"
        refuse(
            (
                self.trains == "decider" and (self.iterate != "decider" or self.max_loops < 2),
                "trains=decider learns which tokens go on: set iterate to decider and max_loops to at least 2",
            ),
            (
                learns_labels and self.oracle.reference is None,
                "a reference model says which tokens are hard: set oracle.reference to the folder of a run, or to a "
                "model",
            ),
            (
                not learns_labels and (self.oracle.reference is not None or self.oracle.cache is not None),
                "oracle.reference and oracle.cache are for labels: set iterate to oracle or trains to decider, or drop "
                "them",
            ),
        )

    @property
    def loop(self) -> LoopSettings:  # type: ignore[override]
        """The LoRA of readings after the first."""
        return ReadingLoop(lora=self.lora.kind, lora_rank=self.lora.rank, lora_gamma=self.lora.gamma)

    @property
    def n_iterations(self) -> int:
        """Each reading after the first may have a LoRA of its own."""
        return self.max_loops - 1

    @property
    def term_weights(self) -> dict[str, float]:
        """The text, or the decider; the shares of hard tokens and of those that went on are only reported."""
        learns_text = self.trains == "model"
        return {"answer": float(learns_text), "decider": float(not learns_text), "hard": 0.0, "iterated": 0.0}

    @property
    def reference_source(self) -> str | None:
        """The oracle."""
        return self.oracle.reference

    def depth(self) -> int:
        """Return D."""
        return self.max_loops

    def begin(self, backbone: Backbone) -> None:
        """Refuse to choose among layers that have learned nothing."""
        message = "a model from scratch has no layer to delete: lower num_hidden_layers, and leave prune_rows out"
        refuse((self.prune_rows is not None, message))

    def convert(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        """Delete the layers that are missed least."""
        if self.prune_rows is None:
            return
        encoder = PromptEncoder(tokenizer)
        rows = [self.lay_out(example, encoder).ids() for example in read_examples(self.prune_rows, limit=N_ROWS)]
        prune_layer(backbone, rows)

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward:
        """Make the decoder that reads hard tokens again."""
        return TahDepth(self, backbone, loop)


@dataclass
class TahOutput(PassOutput):
    """A pass, with the tokens (B, L) that were decided on at each depth and the decider's logits of them."""

    decisions: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class TahDepth(DepthForward):
    """Reads everything once, and hard tokens again."""

    method: Tah
    waits = True

    def __init__(self, method: Tah, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        head = backbone.lm.get_output_embeddings()
        is_linear = head.bias is None and getattr(backbone.config, "final_logit_softcapping", None) is None
        refuse(
            (
                method.residual_logits and method.max_loops > 1 and not is_linear,
                "this model's head is not linear (it caps logits, or has a bias), so its logits do not add up: set "
                "residual_logits to false",
            )
        )
        self.chooser = None
        if method.max_loops > 1:
            self.chooser = Chooser(method.decider, method, backbone, learns=method.trains == "decider")
        if method.trains == "decider":
            for part in (backbone, loop):
                part.requires_grad_(False)
        self.lora_flops = 0.0
        if loop.lora is not None:
            loop.lora.dropout, self.lora_flops = method.lora.dropout, loop.lora.flops
        self.oracle = None if method.oracle.reference is None else Oracle(method.oracle)

    def empty_cache(self) -> DuoCache:
        """Return a cache that has read nothing."""
        return DuoCache()

    # What is known beforehand

    def wanted(self, batch: Batch, reference: Reference | None = None) -> Tensor | None:
        """Return of each column (B, S) how many iterations it shall have, FREE or ONCE.

        Tokens that predict a written one are free; when answering, that is the last of the question. In training the
        oracle labels them, if it is to say.
        """
        if self.training and self.method.iterate == "oracle":
            assert reference is not None
            return self.labels(batch, reference)
        if self.method.prompt_iterates:
            return None
        known = torch.full_like(batch.ids_BS, ONCE)
        if len(batch.targets_U):
            return known.flatten().index_fill(0, batch.predict_at_U, FREE).view(known.shape)
        known[:, -1:] = FREE
        return known

    def labels(self, batch: Batch, reference: Reference) -> Tensor:
        """Return the oracle's depths (B, S); ONCE where nothing is predicted."""
        assert self.oracle is not None
        depths_U = self.oracle.depths(batch, reference, self.method.max_loops)
        if self.method.force_one and self.method.max_loops > 1:
            hashes_U = hashes(batch)
            is_forced = (hashes_U == hashes_U.max()) & (depths_U == 1).all()
            depths_U = torch.where(is_forced, 2, depths_U)
        known = torch.full_like(batch.ids_BS, ONCE)
        return known.flatten().index_copy(0, batch.predict_at_U, depths_U).view(known.shape)

    def known(self, reading: PassInput) -> Tensor:
        """Return what is known of a pass's tokens (B, L); columns that nothing was said of are free."""
        positions, wanted = reading.tokens.positions_RN, reading.wanted_BL
        if wanted is None:
            return torch.full_like(positions, FREE)
        rest = torch.full_like(positions[:, wanted.shape[1] :], FREE)
        return torch.cat([wanted.to(positions.dtype), rest], dim=1)

    # A pass

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass: all tokens, then those that go on, and so forth."""
        if reading.may_wait and reading.tokens.positions_RN.shape[1] == 1:
            return self.go_on(reading)
        part, known_BL, limit = reading.tokens, self.known(reading), self.limit(reading)
        deep = TahOutput(part.states_RND, part.real.long())
        for depth in range(1, limit + 1):
            with self.loop.weights(depth - 1):
                *layers, states = self.read(reading, part, depth)
            before = deep.states_BLD
            if depth == 1:
                deep.states_BLD = states
            else:
                states = part.take(before) + states if self.method.residual_logits else states
                deep.states_BLD = part.put(before, states)
                deep.depths_BL = part.put(deep.depths_BL, torch.full_like(part.positions_RN, depth))
            if reading.trace is not None:
                self.record(reading, depth, deep, before)
            choice = self.choose(reading, part, states, layers, part.take(known_BL), depth)
            if choice is None:
                break
            nowhere = torch.zeros_like(known_BL)
            asked_BL = part.put(nowhere.bool(), choice.asked_RN)
            deep.decisions.append((asked_BL, part.put(nowhere.to(choice.scores_RN.dtype), choice.scores_RN)))
            if choice.logits_AV is not None and depth == 1:
                deep.shown = choice.ends_A, choice.logits_AV
            going = part.with_states(choice.inputs_RND).pick(choice.goes_RN)
            if going is None:
                break
            part = going
        return deep

    def go_on(self, reading: PassInput) -> PassOutput:
        """Read one token of each row: the one that was left unfinished, at its next depth, or the new one."""
        cache, tokens, known_B1 = reading.cache, reading.tokens, self.known(reading)
        assert isinstance(cache, DuoCache)
        left, cache.unfinished = cache.unfinished, None
        depth_B1 = torch.ones_like(known_B1)
        if left is None:
            *layers, states = self.read(reading, tokens, 1)
        else:
            is_old, depth_B1 = left.active_B[:, None], left.depths_B1 + 1
            inputs = torch.where(is_old[..., None], left.inputs_B1D, tokens.states_RND)
            positions = torch.where(is_old, left.positions_B1, tokens.positions_RN)
            tokens = Tokens(inputs, positions, tokens.real | is_old)
            known_B1 = torch.where(is_old, left.known_B1, known_B1)
            with self.weights_of_rows(depth_B1):
                *layers, states = self.read(reading, tokens, depth_B1)
            if self.method.residual_logits:
                states = torch.where(is_old[..., None], left.states_B1D + states, states)
        logits = self.backbone.head(states)
        deep = TahOutput(states, depth_B1, done_BL=tokens.real, logits_BV=logits[:, -1])
        choice = self.choose(reading, tokens, states, layers, known_B1, depth_B1, logits)
        if choice is not None:
            goes, places = choice.goes_RN, tokens.positions_RN
            deep.done_BL = tokens.real & ~goes
            cache.unfinished = Unfinished(goes[:, 0], choice.inputs_RND, states, places, depth_B1 * goes, known_B1)
        return deep

    def limit(self, reading: PassInput) -> int:
        """Return D."""
        return self.method.max_loops if reading.loops is None else reading.loops

    def read(self, reading: PassInput, tokens: Tokens, depth: int | Tensor) -> tuple[Tensor, ...]:
        """Read tokens at a depth; return their states after each layer, if the decider looks at them, and the last."""
        assert isinstance(reading.cache, DuoCache)
        slot = reading.cache.whole(self.backbone.n_layers, reading.tokens.positions_RN)
        looks = self.chooser is not None and self.chooser.decider is not None
        if reading.cost_scope is not None and not (isinstance(depth, int) and depth == 1):
            charge(reading.cost_scope, tokens, (tokens.real & (depth > 1)).double() * self.lora_flops)
        return read_at(self.backbone, tokens, slot, depth, self.method.depth_attention, reading.cost_scope, looks)

    def choose(
        self,
        reading: PassInput,
        part: Tokens,
        states_RND: Tensor,
        layers: list[Tensor],
        known_RN: Tensor,
        depth: int | Tensor,
        logits_RNV: Tensor | None = None,
    ) -> Choice | None:
        """Say which tokens go on from a depth; None where none may."""
        if self.chooser is None:
            return None
        limit = self.limit(reading)
        return self.chooser(part, states_RND, layers, known_RN, depth, limit, logits_RNV, reading.cost_scope)

    def weights_of_rows(self, depth_R1: Tensor) -> AbstractContextManager[None]:
        """Return the block in which each row has the weights of its own depth."""
        if self.loop.lora is None:
            return nullcontext()
        rows: dict[int, list[int]] = {}
        for row, depth in enumerate(depth_R1[:, 0].tolist()):
            if depth > 1:
                rows.setdefault(depth - 1, []).append(row)
        return self.loop.lora.of_rows({loop: torch.tensor(of, device=depth_R1.device) for loop, of in rows.items()})

    def record(self, reading: PassInput, depth: int, deep: PassOutput, before: Tensor) -> None:
        """Note in the trace what the tokens read at a depth have come to."""
        assert reading.trace is not None
        mask_BL = (deep.depths_BL == depth).long()
        kept = torch.nonzero(mask_BL.any(1))[:, 0]
        rows = None if reading.cost_scope is None else reading.cost_scope.rows
        numbers = (kept if rows is None else rows[kept]).tolist()
        new, old = deep.states_BLD[kept], before[kept]
        reading.trace.record(depth, numbers, new, new, old, mask=mask_BL[kept])

    # Loss

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return the decider's loss, and the shares of hard tokens and of those that went on."""
        batch, run = inputs.batch, inputs.thought.context.depth
        deep, at_U, terms = inputs.thought.deep[-1], batch.predict_at_U, PassTerms()
        assert isinstance(deep, TahOutput) and run is not None
        depths_U: Tensor | None = None
        if self.method.trains == "decider" and self.oracle is not None and inputs.reference is not None:
            depths_U = self.oracle.depths(batch, inputs.reference, self.method.max_loops)
            terms["decider"] = self.decider_loss(deep, at_U, depths_U), "answer"
        elif self.training and self.method.iterate == "oracle" and run.wanted_BS is not None:
            depths_U = run.wanted_BS.flatten()[at_U]
        if depths_U is not None:
            terms["hard"] = (depths_U > 1).sum(), "answer"
        terms["iterated"] = (deep.depths_BL.flatten()[at_U] > 1).sum(), "answer"
        return terms

    def decider_loss(self, deep: TahOutput, at_U: Tensor, depths_U: Tensor) -> Tensor:
        """Return, summed over written tokens, how badly the decider told those that shall go on from the others."""
        weight, total = torch.tensor(self.method.pos_weight, device=at_U.device), torch.zeros((), device=at_U.device)
        for depth, (asked_BL, scores_BL) in enumerate(deep.decisions, 1):
            scores_U, asked_U = scores_BL.flatten()[at_U], asked_BL.flatten()[at_U]
            wanted_U = (depths_U > depth).to(scores_U.dtype)
            losses_U = binary_cross_entropy_with_logits(scores_U, wanted_U, pos_weight=weight, reduction="none")
            total = total + (losses_U * asked_U).sum()
        return total
