"""`Plan`: where the inner loop works and what the answer sees, as a method tells the passes."""

from dataclasses import dataclass
from typing import Literal

Scope = Literal["slots", "append", "all", "last"]
FirstState = Literal["embed", "forward"]
PrefixKV = Literal["base", "per_iter"]
AnswerContext = Literal["refeed", "kv_last"]
Sees = Literal["past", "all", "blocks"]


@dataclass(frozen=True)
class Plan:
    """How a row's latents are read.

    Attributes:
        scope: what is refined: all latents (slots), the prompt (all), its end (last), or one latent more (append).
        first_state: z_0: the embeddings of the region, or what one more pass makes of them (in append: the state of
            <bot>).
        answer_context: what the answer attends to: the final state fed once more, or the cache of the last iteration.
        prefix_kv: the prefix is read once with the base weights, or in every iteration with that iteration's.
        decode_lora: the answer is read with the last iteration's weights.
        reads_state: a decoder of its own answers, which reads the final state.
        reads_answer: a stop score looks at the answer's first token in every iteration.
        is_normed: what an iteration gives back is the state after the final norm.
        detach: no gradient flows into what is fed.
        sees: what a position of the answer sees: what comes before it, all of the row, or its block and those before.
    """

    scope: Scope = "slots"
    first_state: FirstState = "embed"
    answer_context: AnswerContext = "refeed"
    prefix_kv: PrefixKV = "base"
    decode_lora: bool = False
    reads_state: bool = False
    reads_answer: bool = False
    is_normed: bool = True
    detach: bool = False
    sees: Sees = "past"
