"""`Halves`: rows that are denoised block by block are read twice, as they were written and with tokens hidden.

    clean    [Q1 Q2 | a b | c d |    ]          a block sees itself and those before it
    noised   [      | M b | M d | e M]          a block sees itself, and those before it in the other half

A block's hidden tokens are predicted from what is clean before it, as when it will be filled. The last block is read
noised alone, and what comes before the first block of an answer is read clean alone: nobody would see them otherwise.

Shapes: `B` rows, `S` columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.text.row import Row


@dataclass
class Halves:
    """What a batch of such rows has besides its noised tokens.

    Attributes:
        clean_BS: the tokens, none hidden.
        blocks_BS: the block of each column; 0 for padding.
        n_clean: how many columns are read as they were written.
        first_noised: the first column that is read noised.
        shift: the column before a token predicts it.
    """

    clean_BS: Tensor
    blocks_BS: Tensor
    n_clean: int
    first_noised: int
    shift: bool


def halves_of(rows: Sequence[Row], columns: Sequence[Sequence[int]], width: int, pad_id: int) -> Halves | None:
    """Return the halves of rows whose real columns are known; None where no row has blocks."""
    if not any(row.noise is not None and row.noise.blocks for row in rows):
        return None
    clean_BS, blocks_BS = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    n_clean, first_noised = 0, width
    for r, (row, real) in enumerate(zip(rows, columns)):
        if row.noise is None or not real:
            continue
        blocks = row.noise.blocks
        clean_BS[r, list(real)], blocks_BS[r, list(real)] = torch.tensor(row.ids()), torch.tensor(blocks)
        first, last = blocks[min(row.region_start, len(blocks) - 1)], blocks[-1]
        n_clean = max([n_clean, *(1 + real[k] for k, block in enumerate(blocks) if block < last)])
        first_noised = min([first_noised, *(real[k] for k, block in enumerate(blocks) if block >= first)])
    shift = any(row.noise is not None and row.noise.shift for row in rows)
    return Halves(clean_BS, blocks_BS, n_clean, first_noised, shift)
