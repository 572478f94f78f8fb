"""What a denoising method is: an answer of fixed length is refined as a whole, by passes that see all of it.

It begins as masks. The loop's state is a canvas of tokens, f is a pass that sees all of the row, and what an iteration
does with its output is a commit (`canvas.py`). Answers end in an end of sequence and are filled up with more of them,
which is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from innerloop.config.method import Method
from innerloop.config.plan import Plan
from innerloop.config.soft_masks import SoftSettings
from innerloop.errors import InputError, refuse
from innerloop.methods.denoise.noise import ahead, coin, cut, fillers, hide, of_step, times
from innerloop.methods.denoise.settings import NoiseSettings, SamplerSettings
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import MASK, Kind, Row, Span

if TYPE_CHECKING:  # slow to import
    from torch import nn

    from innerloop.decoder.backbone import Backbone


class DenoisingMethod(Method):
    """A method that fills a canvas of masks."""

    family: ClassVar[str] = "denoise"

    gen_length: int = 64
    shift: bool = False
    write_steps: bool = True
    mask_token: str = MASK
    anneal_steps: int = 0
    has_scorer: ClassVar[bool] = False  # a network of its own decides what is filled
    goes_on_with: ClassVar[tuple[str, ...]] = ("shift", "mask_token")  # fields that must stay as a run was trained
    noise: NoiseSettings = NoiseSettings()
    sampler: SamplerSettings = SamplerSettings()
    soft: SoftSettings = SoftSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler.check(self.gen_length, self.canvas_block)
        is_random = self.noise.filler == "random"
        refuse(
            (
                self.sampler.commit == "learned" and not self.has_scorer,
                f"'{self.name}' has no policy that is learned, as sampler.commit=learned asks for: choose another "
                "rule, or the method dcolt or unmasking_policy",
            ),
            (
                is_random and self.sampler.commit == "learned",
                "sampler.commit=learned looks at masks, and with noise.filler=random none is read: set it to mask",
            ),
            (
                is_random and self.soft.is_on,
                "soft masks mix the mask's embedding, and with noise.filler=random none is read: set soft.share to 0",
            ),
            (
                is_random and self.sampler.guidance > 0,
                "sampler.guidance masks the question, and with noise.filler=random no mask is learned: set it to 0",
            ),
            (
                self.soft.is_on and self.sampler.cache != "none",
                "soft masks are fed anew in each pass, and sampler.cache does not read all of them: set cache to none",
            ),
        )

    @property
    def canvas_block(self) -> int:
        """How many tokens of a canvas are of one block."""
        return self.sampler.block_length or self.gen_length

    @property
    def needs_steps(self) -> bool:
        """Examples without steps are written as they are."""
        return False

    @property
    def plan(self) -> Plan:
        """Every token of a row sees every other."""
        return Plan(sees="all")

    # Layout

    @property
    def markers(self) -> tuple[str, ...]:
        """The mask, which is never written."""
        return (self.mask_token,)

    def check_mask(self, encoder: PromptEncoder) -> int:
        """Return the id of the mask; refuse one that means something else already."""
        tokenizer, mask_id = encoder.tokenizer, self.mask_id(encoder)
        for what, i in (("padding", tokenizer.pad_token_id), ("end-of-sequence", encoder.eos_id)):
            refuse(
                (
                    mask_id == i,
                    f"mask_token is '{self.mask_token}', which is the tokenizer's {what} token: choose another, such "
                    f"as {MASK}, which is added where it is missing",
                )
            )
        return mask_id

    def mask_id(self, encoder: PromptEncoder) -> int:
        """Return the id of the mask."""
        return encoder.marker(self.mask_token).ids[0]

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q] | | ([T_1]..[T_m])[### A][eos][eos]..``, so many ends that the answer has ``gen_length`` tokens.

        An answer that is longer is laid out whole, and refused where it would be learned. Running text is as long as it
        is, and all of it but its first token may be hidden.
        """
        row = self.prompt(example.question, encoder, stage)
        row.suffix = [*(encoder.steps(example) if self.write_steps else ()), encoder.answer(example.answer)]
        n = sum(len(span.ids) for span in row.suffix)
        if not encoder.running_text and n < self.gen_length:
            row.suffix.append(Span((encoder.eos_id,) * (self.gen_length - n), Kind.ANSWER, supervised=True))
        return row

    def check_examples(self, examples: Sequence[Example], encoder: PromptEncoder) -> None:
        """Refuse answers that are longer than the canvas, or that would be cut."""
        refuse(
            (
                self.noise.truncate > 0 and not encoder.running_text,
                "noise.truncate cuts running text, and these are questions with answers: leave it out",
            )
        )
        for example in examples:
            self.fitting(example, encoder)

    def blocks(self, row: Row) -> tuple[int, ...]:
        """Return the block of each position of a row, which sees its own and those before; none: it sees all."""
        return ()

    def fitting(self, example: Example, encoder: PromptEncoder) -> Row:
        """Lay out an example whose answer fits into the canvas.

        Raises:
            InputError: it is longer.
        """
        row = self.lay_out(example, encoder)
        n = len(row) - row.region_start
        if not encoder.running_text and n > self.gen_length:
            raise InputError(
                f"example '{example.id}' has an answer of {n} tokens, but the canvas has gen_length={self.gen_length}: "
                f"raise it to {n} or more, or leave the example out"
            )
        return row

    def prompt(self, question: str, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q]``."""
        return Row([encoder.question(question)])

    def rows(
        self, examples: Sequence[Example], encoder: PromptEncoder, stage: int | None = None, seed: str = ""
    ) -> list[Row]:
        """Lay out examples with tokens hidden; without a seed, by always the same draws."""
        mask_id, rows, found = self.mask_id(encoder), [self.fitting(example, encoder) for example in examples], []
        is_soft = not seed or coin("soft", of_step(seed)) < self.soft.share
        cuts = bool(seed) and encoder.running_text and coin("truncate", seed) < self.noise.truncate
        kept = coin("length", seed) if cuts else 1.0
        rows = [cut(row, max(round(kept * len(row)), 2)) for row in rows] if cuts else rows
        for i, (row, t) in enumerate(zip(rows, self.times(rows, seed))):
            own = f"{seed}/{i}"
            row = hide(row, t, self.noise, mask_id, self.shift, own, self.blocks(row))
            found.append(self.shown(row, encoder, own, is_soft, ahead(self.anneal_steps, seed)))
        return found

    def times(self, rows: Sequence[Row], seed: str) -> Sequence[float | Mapping[int, float]]:
        """Return the time of each row of a batch, or of each of its blocks."""
        return times(max(len(rows), 1), seed)

    def shown(
        self,
        row: Row,
        encoder: PromptEncoder,
        seed: str,
        is_soft: bool = True,
        sees_ahead: tuple[float, str] | None = None,
    ) -> Row:
        """Return a row with hidden tokens as this method reads it: as masks, soft ones, or random tokens."""
        noise = row.noise
        assert noise is not None
        if self.noise.filler == "random":
            n_words = len(encoder.tokenizer)
            noise = replace(noise, fillers=fillers(len(noise.hidden), n_words, noise.mask_id, seed))
        return replace(row, noise=replace(noise, soft=is_soft and self.soft.is_on, ahead=sees_ahead))

    def check_start(self, saved: Mapping[str, Any], folder: object) -> None:
        """Refuse to go on from a run, whose method's fields are ``saved``, that predicts at other places."""
        for name in self.goes_on_with:
            own, theirs = getattr(self, name), saved.get(name)
            refuse(
                (
                    theirs is not None and theirs != own,
                    f"{folder} was trained with {name}={theirs}, and here it is {own}: set method.{name} to {theirs}, "
                    "or start from the decoder that it was made of",
                )
            )

    def make_scorer(self, backbone: Backbone) -> nn.Module | None:
        """Return the network that decides what is filled, where it is learned."""
        return None

    # The loop

    @property
    def takes_loops(self) -> bool:
        """Passes over a canvas can be more or fewer."""
        return True

    def with_loops(self, loops: int) -> Self:
        """Return the method with another number of passes over a canvas."""
        return replace(self, sampler=replace(self.sampler, steps=loops))  # type: ignore[call-arg]
