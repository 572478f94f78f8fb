"""What a model is tried on when it is loaded: all that will be done with it, on a few tokens, in a few short passes.

Two rows are read alone and whole, and then together as methods read them: padded before, between and behind, in three
pieces on a cache that is forked, cut and put together again, with states in the middle that are no words. A model for
which that differs is refused, and only then are more passes made, to say what it was.

Shapes: `B` rows, `L` columns, `P` columns so far, `D` width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from innerloop.decoder.anatomy import head_dim_of
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cache import AnyCache, expect_padding, fork, join_rows, keep_columns, select_rows
from innerloop.decoder.columns import counts_columns
from innerloop.decoder.kv_buffer import BufferedLayer
from innerloop.decoder.masks import Sees
from innerloop.errors import InputError

FULL, HALF = (
    (1e-3, 1e-3),
    (0.02, 0.1),
)  # how far logits may be from the model's own, and states, as shares of their size
FIRST_WORD = 5  # ids before it are often special
WINDOWS, SHORT = ("sliding_window", "attention_chunk_size"), 3  # what limits how far back layers look, in the trial
N_REAL = 6  # columns of each row
LATENTS = range(2, 4)  # which of the first row's are no words; the second is of words alone
Pieces = tuple[tuple[tuple[int, ...], ...], ...]
PIECES: Pieces = (  # prefix, region and suffix of both rows; 1 where a column is real
    ((0, 0, 1, 1), (1, 1, 1, 1)),
    ((1, 1), (1, 0)),
    ((1, 1), (1, 0)),
)
ALONE: Pieces = (((1, 1),), ((1, 1),), ((1, 1),))  # the first row, without padding


@torch.no_grad()
def check_passes(backbone: Backbone, sections: bool = False, sees_all: bool = False) -> None:
    """Verify that a model does what methods ask of it.

    Args:
        backbone: the model.
        sections: its layers are run apart, too, as methods do that loop inside the token.
        sees_all: its tokens must see more than the past, too, as methods ask that denoise.

    Raises:
        InputError: it does not; the message says what differs.
    """
    was_training = backbone.lm.training
    backbone.lm.eval()
    try:
        with _short_windows(backbone.config):
            trial = Trial(backbone)
            trial.look_at_cache()
            trial.read_whole()
            if not trial.reads_alike(PIECES, forks=True, joins=True):
                trial.refuse(trial.reason())
            if sections:
                trial.run_sections()
            if sees_all:
                trial.see_all()
    finally:
        backbone.lm.train(was_training)


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Let layers look back so little that the trial's few columns go past it, whatever the model's own window."""
    own = {name: getattr(config, name, None) for name in WINDOWS}
    long = {name: size for name, size in own.items() if isinstance(size, int) and size > SHORT}
    try:
        for name in long:
            setattr(config, name, SHORT)
        yield
    finally:
        for name, size in long.items():
            setattr(config, name, size)


def gap_of(found: Tensor, expected: Tensor) -> float:
    """Return how far numbers are from others, as a share of the size of those; NaN where one is."""
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / (expected.norm() or 1.0)).item()


class Trial:
    """Passes of a model whose outcomes are known.

    Attributes:
        words_L: the ids of the second row.
        embeds_BLD: what the rows read: words, but for the latents in the middle of the first.
        whole_BLD: the states of rows alone, read in one pass without cache or padding.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        table = backbone.lm.get_input_embeddings().weight
        is_exact = table.dtype.itemsize >= 4 and torch.get_float32_matmul_precision() == "highest"
        self.logits_gap, self.states_gap = FULL if is_exact else HALF
        ids_BL = FIRST_WORD + torch.arange(2 * N_REAL, device=table.device).view(2, N_REAL)
        ids_BL = ids_BL % len(table)
        self.words_L = ids_BL[1]
        with self.doing("embedding words"):
            self.embeds_BLD = backbone.embed(ids_BL).clone()
        self.embeds_BLD[0, LATENTS] = self.embeds_BLD[:, LATENTS].mean(0)
        self.whole_BLD = self.embeds_BLD

    def refuse(self, why: str) -> None:
        """Refuse the model."""
        kind = type(self.backbone.lm)
        remote = kind.__module__.startswith("transformers_modules")
        whose = " (whose code came with it, trust_remote_code)" if remote else ""
        raise InputError(f"{kind.__name__}{whose} cannot be used: {why}; docs/models.md lists what can")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Refuse the model where its own code raises something."""
        try:
            yield
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self.refuse(f"{what} fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def read_whole(self) -> None:
        """Read the rows alone; words must show the model's own logits."""
        backbone, before_BLD = self.backbone, self.embeds_BLD.clone()
        positions_BL = torch.arange(N_REAL, device=backbone.device).expand(2, -1)
        with self.doing("reading words"):
            own = backbone.lm(input_ids=self.words_L[None], attention_mask=torch.ones_like(self.words_L)[None]).logits[
                0
            ]
        with self.doing("a pass from embeddings"):
            states = backbone(self.embeds_BLD, positions_BL=positions_BL, all_states=True)
            if len(states) != backbone.n_layers + 1:
                self.refuse("it does not give the state after each layer")
            self.whole_BLD = states[-1]
            gap = gap_of(backbone.head(self.whole_BLD[1]), own)
        if not own.isfinite().all():
            self.refuse("its logits are not finite, so its weights are damaged or too large for their dtype")
        if not gap <= self.logits_gap:
            self.refuse(f"run from embeddings it gives other logits than by itself (by {gap:.2g} of their size)")
        if not torch.equal(before_BLD, self.embeds_BLD):
            self.refuse("it changes in place the embeddings that it is given")
        widths = (self.embeds_BLD.shape[-1], self.whole_BLD.shape[-1], backbone.width)
        if len(set(widths)) > 1:
            self.refuse(f"its embeddings, states and layers have unlike widths ({widths[0]}, {widths[1]}, {widths[2]})")

    def look_at_cache(self) -> None:
        """Refuse a model whose layers remember more than keys and values."""
        with self.doing("making a cache"):
            layers = self.backbone.empty_cache().layers
        for i, layer in enumerate(layers):
            if not isinstance(layer, BufferedLayer):
                self.refuse(
                    f"layer {i} remembers more than keys and values (a {type(layer).__name__}), which can neither be "
                    "forked nor kept free of padding"
                )
        try:
            head_dim_of(self.backbone.config)
        except Exception:
            self.refuse("its layers differ in shape, or do not say it, so that their work cannot be counted")

    def reads_alike(self, pieces: Pieces, forks: bool = False, joins: bool = False) -> bool:
        """Whether rows that are read in pieces have the states of rows alone.

        Args:
            pieces: which columns of each piece are real, row by row.
            forks: another fork of the cache reads something else in between.
            joins: columns are dropped, and rows parted and joined, before the last piece.
        """
        with self.doing("a cached pass over a padded batch"):
            masks = [torch.tensor(piece, device=self.backbone.device) for piece in pieces]
            mask_BP, cache, found = masks[0][:, :0], self.backbone.empty_cache(), []
            for i, mask_BL in enumerate(masks):
                is_last = i == len(PIECES) - 1
                if joins and is_last:
                    cache = _cut_and_joined(cache, torch.arange(mask_BP.shape[1], device=mask_BP.device))
                mask_BP = torch.cat([mask_BP, mask_BL], dim=1)
                if forks and i == 1:
                    self._read(fork(cache), mask_BP, mask_BL.shape[1], sign=-1)
                    cache = fork(cache)
                states = self._read(cache, mask_BP, mask_BL.shape[1], normed=not is_last)
                found.append(self.backbone.norm(states) if is_last else states)
        for row in range(len(masks[0])):
            mine_LD = torch.cat([states[row, mask[row].bool()] for states, mask in zip(found, masks)])
            if not gap_of(mine_LD, self.whole_BLD[row, : len(mine_LD)]) <= self.states_gap:
                return False
        return True

    def see_all(self) -> None:
        """Refuse a model whose attention does not follow a mask."""
        backbone, embeds_BLD = self.backbone, self.embeds_BLD
        positions_BL = torch.arange(N_REAL, device=backbone.device).expand(2, -1)
        real_BL = torch.ones_like(positions_BL)

        def read(embeds: Tensor, mask_BL: Tensor, positions: Tensor, sees: Sees) -> Tensor:
            mask = backbone.mask_of(mask_BL, mask_BL.shape[1], 0, embeds.dtype, sees)
            return backbone(embeds, mask=mask, positions_BL=positions)

        with self.doing("a pass that sees more than the past"):
            plain = backbone(embeds_BLD, positions_BL=positions_BL)
            causal, whole = (read(embeds_BLD, real_BL, positions_BL, sees) for sees in ("past", "all"))
            other = read(torch.cat([embeds_BLD[:, :-1], -embeds_BLD[:, -1:]], 1), real_BL, positions_BL, "all")
            padded = [pad(x, (0, 0) * (x.ndim - 2) + (2, 0)) for x in (embeds_BLD, real_BL, positions_BL)]
            behind = read(padded[0], padded[1], padded[2], "all")[:, 2:]
        if not gap_of(causal, plain) <= self.states_gap:
            self.refuse("under a mask that shows the past it gives other states than without")
        if gap_of(other[:, 0], whole[:, 0]) <= 1e-6 or gap_of(whole[:, :-1], plain[:, :-1]) <= 1e-6:
            self.refuse("its attention sees the past alone, whatever the mask, so it cannot denoise")
        if not gap_of(behind, whole) <= self.states_gap:
            self.refuse("where all is seen, a row behind padding gets other states than alone")

    def _read(self, cache: AnyCache, mask_BP: Tensor, n_new: int, sign: int = 1, normed: bool = True) -> Tensor:
        """Read the last columns; with -1 for ``sign`` something else in their place."""
        positions_BL = (mask_BP.cumsum(1) - 1).clamp(min=0)[:, -n_new:]
        embeds_BLD = sign * self.embeds_BLD[torch.arange(len(mask_BP))[:, None], positions_BL]
        mask = None
        if not mask_BP.all():
            mask = self.backbone.mask_of(mask_BP, n_new, expect_padding(cache), embeds_BLD.dtype)
        return self.backbone(embeds_BLD, mask=mask, positions_BL=positions_BL, cache=cache, normed=normed)

    def reason(self) -> str:
        """Say why rows in pieces have other states than rows alone."""
        n = N_REAL // 2
        positions_BL = torch.arange(N_REAL, device=self.backbone.device)[None]
        with self.doing("a pass"):
            states = self.backbone(self.embeds_BLD[:, :n], positions_BL=positions_BL[:, :n])
            bare = self.backbone(self.embeds_BLD, positions_BL=positions_BL, normed=False)
        if not gap_of(states, self.whole_BLD[:, :n]) <= self.states_gap:
            return "later tokens change the states of earlier ones"
        if not gap_of(self.backbone.norm(bare), self.whole_BLD) <= self.states_gap:
            return "its final norm does not make its states of those before it"
        if not self.reads_alike(ALONE):
            return "a cached pass in pieces gives other states than one over the whole"
        if not self.reads_alike(ALONE, forks=True):
            return "what one fork of its cache reads changes another"
        if not self.reads_alike(PIECES[:1]) or not self.reads_alike(PIECES):
            return "a row in a padded batch gets other states than alone"
        return "rows whose caches are cut and joined get other states than alone"

    def run_sections(self) -> None:
        """Refuse a model whose layers, run one part after the other, give other states than the whole."""
        backbone, half = self.backbone, self.backbone.n_layers // 2
        if counts_columns(backbone.decoder):
            self.refuse(
                "methods that loop inside the token give attention the positions of tokens, and it counts columns; "
                "choose one that thinks in latents"
            )
        with self.doing("a pass over some of its layers"):
            positions_BL = torch.arange(N_REAL, device=backbone.device).expand(2, -1)
            states = backbone.enter(self.embeds_BLD, positions_BL)
            for layers in (range(half), range(half, backbone.n_layers)):
                if len(layers):
                    states = backbone(states, positions_BL=positions_BL, layers=layers, inner=True)
            gap = gap_of(backbone.norm(states), self.whole_BLD)
        if not gap <= self.states_gap:
            self.refuse(f"its layers run one part after the other give other states (by {gap:.2g} of their size)")


def _cut_and_joined(cache: AnyCache, columns_P: Tensor) -> AnyCache:
    """Part the rows, drop the two columns of padding that the first begins with, and join them with a gap there."""
    first, second = (select_rows(cache, columns_P[row : row + 1]) for row in (0, 1))
    return join_rows([keep_columns(first, columns_P[2:]), second], [2, 0], columns_P[:2])
