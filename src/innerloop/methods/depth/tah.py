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

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Chance, Count, Dropout, Layers, Natural, Positive, SomeLoops, Weight
from innerloop.config.loop import BankKind, LoopSettings
from innerloop.errors import refuse
from innerloop.methods.depth.method import DepthMethod
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import read_examples

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

    from innerloop.decoder.backbone import Backbone

DepthAttention = Literal["duo", "depth1_only", "same_depth"]
Iterate = Literal["decider", "oracle", "always", "never"]


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
class DeciderSettings(Checked):
    """The network that says which tokens go on.

    Args:
        layers: after which layers it looks at the states, 0 being the embeddings; empty: five, evenly spaced.
        width: its inner width.
        blocks: its residual blocks.
        dropout: inside them.
    """

    layers: tuple[Natural, ...] = ()
    width: Count = 256
    blocks: Layers = 6
    dropout: Dropout = 0.1


@dataclass(frozen=True)
class OracleSettings(Checked):
    """Which tokens are hard, for those who learn from it.

    Args:
        reference: the oracle: folder of a run, or a Hugging Face model of the same vocabulary; not the trained one.
        metric: a token is hard where the reference errs (mismatch), or by its cross-entropy or entropy.
        share: ce and entropy: the share of a batch's written tokens that is hard, split evenly over more iterations;
            mismatch has a share of its own.
        cache: a file that keeps the reference's numbers, so that each row is labelled once.
    """

    reference: str | None = None
    metric: Literal["mismatch", "ce", "entropy"] = "mismatch"
    share: Chance = 0.12
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.metric == "mismatch" and self.share != OracleSettings.share,
                "oracle.share is for the hardest tokens by ce or entropy: mismatch has a share of its own",
            ),
        )


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
    forward: ClassVar[str] = "innerloop.methods.depth.tah_forward:TahDepth"

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
        from innerloop.methods.depth.prune import N_ROWS, prune_layer

        encoder = PromptEncoder(tokenizer)
        rows = [self.lay_out(example, encoder).ids() for example in read_examples(self.prune_rows, limit=N_ROWS)]
        prune_layer(backbone, rows)
