"""An auxiliary decoder that must tell a reasoning step from its latents; it teaches them, and is not used to answer.

    [z_1]..[z_c] [E(t_1)]..[E(t_n-1)]  -->  t_1 .. t_n

The latents are the whole prompt, but for the question where asked for; earlier steps are not read (simcot.md, sections
2 to 4; lotus.md, LOTUS-aux).
Shapes: `G` latent groups, `c` latents of a group, `L` tokens of the longest step, `D` width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from innerloop.config.losses import AuxSettings
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.token_losses import HeadInputs, token_losses
from innerloop.errors import InputError
from innerloop.loop.loop import InnerLoop
from innerloop.loop.lora import LoopLora
from innerloop.model.losses import state_at
from innerloop.passes.context import Context
from innerloop.passes.loss_inputs import LossInputs
from innerloop.passes.region import Masked
from innerloop.text.batch import AuxTargets
from innerloop.text.row import ANSWER_PASS, FED, IGNORE, Row


class StepDecoder(nn.Module):
    """The decoder.

    Args:
        settings: its options.
        backbone: the model that it copies or shares.
        other: the model that it is made of instead of a copy.
    """

    def __init__(self, settings: AuxSettings, backbone: Backbone, other: PreTrainedModel | None = None):
        super().__init__()
        self.settings = settings
        self.own: Backbone | None = None
        self.widen: nn.Linear | None = None
        self.lora: LoopLora | None = None
        if not settings.is_shared:
            self.own = Backbone(copy.deepcopy(backbone.lm) if other is None else other)
            if self.own.width != backbone.width:
                self.widen = nn.Linear(backbone.width, self.own.width)
            n_layers = min(settings.layers or self.own.n_layers, self.own.n_layers)
            del self.own.layers[n_layers:]
            self.own.lm.config.num_hidden_layers = n_layers
            table, head = self.own.lm.get_input_embeddings().weight, self.own.lm.get_output_embeddings().weight
            if settings.embed == "base" and table is not head:
                table.requires_grad_(False)  # nobody reads it
        elif settings.lora_rank:
            self.lora = LoopLora(backbone, 1, settings.lora_rank, 2.0 * settings.lora_rank, "shared")

    def reader(self, backbone: Backbone) -> Backbone:
        """Return what reads."""
        return backbone if self.own is None else self.own

    def check_room(self, rows: Iterable[Row], backbone: Backbone) -> None:
        """Refuse rows whose steps need more positions than a decoder of a smaller context than the model's reads."""
        room = None if self.own is None else self.own.context_length
        if room is None or (backbone.context_length is not None and room >= backbone.context_length):
            return
        longest = max(map(self.settings.n_told_positions, rows))
        if longest > room:
            raise InputError(
                f"the auxiliary decoder needs {longest} positions to tell a step but reads at most {room}; leave long "
                "examples out with train.max_length, or choose another aux.source"
            )

    def embed(self, ids_GL: Tensor, backbone: Backbone) -> Tensor:
        """Return the embeddings of step tokens (G, L, D)."""
        embeds = (self.reader(backbone) if self.settings.embed == "own" else backbone).embed(ids_GL)
        return embeds.detach() if self.settings.detach and self.settings.embed == "base" else embeds

    def forward(self, latents_GcD: Tensor, ids_GL: Tensor, backbone: Backbone, asked: Masked | None = None) -> Tensor:
        """Return the logits (G, L, V) of each step token, from the latents and the tokens before it.

        ``asked`` are the embeddings of what is read before the latents.
        """
        return self.reader(backbone).head(self.read(latents_GcD, ids_GL, backbone, asked))

    def read(self, latents_GcD: Tensor, ids_GL: Tensor, backbone: Backbone, asked: Masked | None = None) -> Tensor:
        """Return the states (G, L, D) that predict each step token."""
        reader, c = self.reader(backbone), latents_GcD.shape[1]
        if self.widen is not None:
            latents_GcD = self.widen(latents_GcD.to(self.widen.weight.dtype)).to(latents_GcD.dtype)
        words = self.embed(ids_GL[:, :-1], backbone).to(latents_GcD.dtype)
        if self.settings.detach and self.settings.embed == "base":
            words = words.detach()  # the table is the model's too
        embeds = torch.cat([latents_GcD, words], dim=1)
        context = Context(reader, len(embeds))
        context.next_position_B += self.settings.position
        if self.lora is not None:
            lora = self.lora
            context.weights = lambda: lora.at(1)
        if asked is not None:
            context.read(*asked)
        return context.read(embeds)[:, c - 1 :]

    @torch.no_grad()
    def tell(
        self,
        latents_GcD: Tensor,
        backbone: Backbone,
        eos_id: int,
        max_tokens: int = 32,
        asked: Masked | None = None,
    ) -> list[list[int]]:
        """Return the tokens that each group of latents tells, likeliest first, up to the end of sequence."""
        ids = torch.zeros(len(latents_GcD), 1, dtype=torch.long, device=latents_GcD.device)
        for n in range(max_tokens):
            best = self(latents_GcD, ids, backbone, asked)[:, n].argmax(-1)
            ids = torch.cat([ids[:, :-1], best[:, None], torch.zeros_like(ids[:, :1])], dim=1)
        told = ids[:, :-1].tolist()
        return [row[: row.index(eos_id)] if eos_id in row else row for row in told]


def group_latents(inputs: LossInputs, loop: InnerLoop, sites: AuxTargets) -> Tensor:
    """Return the latents (G, c, D) that tell: those fed as inputs, or the outputs of a pass."""
    batch, thought = inputs.batch, inputs.thought
    assert thought.loop is not None or sites.iteration == ANSWER_PASS
    if sites.iteration == FED:
        assert thought.loop is not None
        parts = thought.loop.states
        fed = [state_at(parts, thought.loop.state, t) for t in range(1, len(parts) + 1)]
        last = thought.answer[-1][:, :1]  # of the last latent: what would be fed next
        z_0, z_T = thought.loop.first, thought.loop.state
        after = loop.residual(loop.feed_back(last, None), z_0, z_T, len(parts) + 1)
        states, start = torch.cat([z_0, *fed, after], dim=1), 0
    elif sites.iteration == ANSWER_PASS:
        states, start = thought.answer[-1], batch.bounds[0] - thought.first_column
    else:
        assert thought.loop is not None
        states, start = state_at(thought.loop.outputs, thought.loop.state, sites.iteration), 0
        states = inputs.head_input(states)  # what is told is what the head would read
    columns = sites.first_G[:, None] + start + torch.arange(sites.n_latents, device=states.device)
    return states[sites.rows_G[:, None], columns]


def group_questions(inputs: LossInputs, decoder: StepDecoder, sites: AuxTargets) -> Masked | None:
    """Return the questions that the decoder of each group reads (G, L, D) and their mask; None if it reads none."""
    if not decoder.settings.question:
        return None
    columns, mask = inputs.batch.columns(0)
    asked = decoder.embed(inputs.batch.ids_BS[:, columns], inputs.backbone)
    return asked[sites.rows_G], None if mask is None else mask[sites.rows_G]


def _of_another_row(sites: AuxTargets) -> Tensor:
    """Return for each group the place (G,) of the same group in the next row that has it; its own if none has."""
    places: dict[int, list[int]] = {}
    for place, first in enumerate(sites.first_G.tolist()):
        places.setdefault(first, []).append(place)
    other = {place: next_ for found in places.values() for place, next_ in zip(found, [*found[1:], found[0]])}
    return torch.tensor([other[place] for place in range(len(other))], device=sites.first_G.device)


def aux_weights(groups_G: Tensor, counts_K3: Tensor, norm: Literal["per_row", "token_mean"]) -> Tensor:
    """Return what groups (G,) count in the mean over all groups of the mean over rows, or tokens, of each.

    A group that tells nothing in any row counts too.
    """
    n_groups = (counts_K3[:, 0] > 0).sum()
    return 1 / (n_groups * counts_K3[groups_G, 1 if norm == "per_row" else 2])


def aux_loss(
    inputs: LossInputs,
    decoder: StepDecoder,
    loop: InnerLoop,
    shuffled: bool = False,
    counts_K3: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of the told steps, averaged over groups as ``norm`` says.

    ``shuffled`` gives every group the latents of the same group in another row: a decoder that reads them does worse.
    ``counts_K3`` are the counts of the groups of the global batch, of which this one gives its share of the mean; None:
    those of this batch.
    """
    batch, settings = inputs.batch, decoder.settings
    counts_K3 = batch.aux_K3 if counts_K3 is None else counts_K3
    total = batch.ids_BS.new_zeros((), dtype=torch.float32)
    for sites in batch.aux_targets:
        latents = group_latents(inputs, loop, sites)
        if settings.detach:
            latents = latents.detach()
        if shuffled:
            latents = latents[_of_another_row(sites)]
        asked = group_questions(inputs, decoder, sites)
        states = decoder.read(latents, sites.ids_GL, inputs.backbone, asked).flatten(0, 1)
        show = HeadInputs(decoder.reader(inputs.backbone).head, states)
        losses = token_losses(show, sites.targets_GL.flatten(), inputs.chunk, IGNORE)
        loss_GL = losses.view_as(sites.targets_GL)
        assert counts_K3 is not None
        total = total + (loss_GL.sum(1) * aux_weights(sites.groups_G, counts_K3, settings.norm)).sum()
    return total
