"""Which tokens are hard: a reference model, frozen and not the one that is trained, reads the same rows (tah.md, 5).

    mismatch: its likeliest next token is not the one written: 2 iterations, or where there may be more, a number drawn
              evenly from 2..D for each place of each text, once and for all
    ce, entropy: tokens are ranked by the reference's cross-entropy or entropy; the hardest share of a batch iterates

A label belongs to the position that predicts a token. The reference's numbers may be kept in a file.

Shapes: `B` rows, `S` columns, `U` written tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop.disk.files import append, write_text
from innerloop.errors import InputError
from innerloop.methods.depth.tah import OracleSettings
from innerloop.passes.loss_inputs import Reference
from innerloop.text.batch import Batch
from innerloop.text.codec import read_lines

MIX = 0x9E3779B1  # spreads hashes of places over 32 bits


class Oracle:
    """Labels tokens with the number of iterations they shall have."""

    def __init__(self, settings: OracleSettings):
        self.metric, self.share = settings.metric, settings.share
        self.path = None if settings.cache is None else Path(settings.cache)
        self._known: dict[str, list[float]] | None = None

    def depths(self, batch: Batch, reference: Reference, limit: int) -> Tensor:
        """Return each written token's number of iterations (U,), from 1 to ``limit``."""
        hardness_U = self.hardness(batch, reference)
        if limit < 2:
            return torch.ones_like(batch.targets_U)
        if self.metric == "mismatch":
            drawn_U = 2 + hashes(batch) % (limit - 1)
            return torch.where(hardness_U > 0, drawn_U, 1)
        n = len(hardness_U)
        rank_U = torch.empty_like(batch.targets_U)
        rank_U[hardness_U.argsort(stable=True)] = torch.arange(n, device=rank_U.device)
        cuts = [1 - self.share * (limit - d) / (limit - 1) for d in range(1, limit)]
        return 1 + torch.stack([rank_U >= round(cut * n) for cut in cuts]).sum(0)

    def hardness(self, batch: Batch, reference: Reference) -> Tensor:
        """Return how hard the reference finds each written token (U,), in fp32."""
        if self.path is None:
            return self.measure(batch, reference)
        if self._known is None:
            self._known = self._read(reference)
        keys = [_key(ids, mask) for ids, mask in zip(batch.ids_BS.tolist(), batch.mask_BS.tolist())]
        if missing := [key for key in keys if key not in self._known]:
            parts = self.measure(batch, reference).split(batch.n_targets)
            found = {key: part.tolist() for key, part in zip(keys, parts) if key in missing}
            self._known |= found
            append(self.path, "".join(json.dumps([key, values]) + "\n" for key, values in found.items()))
        values = [value for key in keys for value in self._known[key]]
        return torch.tensor(values, device=batch.ids_BS.device)

    def measure(self, batch: Batch, reference: Reference) -> Tensor:
        """Let the reference read a batch."""
        logits_UV = reference.logits(batch).float()
        match self.metric:
            case "mismatch":
                return (logits_UV.argmax(-1) != batch.targets_U).float()
            case "ce":
                return cross_entropy(logits_UV, batch.targets_U, reduction="none")
        log_p = logits_UV.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def _read(self, reference: Reference) -> dict[str, list[float]]:
        """Return what the file knows, after making it if there is none."""
        assert self.path is not None
        title = {"metric": self.metric, "reference": reference.fingerprint()}
        if not self.path.exists():
            write_text(self.path, json.dumps(title) + "\n")
        lines = read_lines(self.path)
        if not lines or lines[0] != json.dumps(title):
            raise InputError(
                f"{self.path} holds labels of another reference or metric; remove it, or name another oracle.cache"
            )
        return dict(json.loads(line) for line in lines[1:] if line.endswith("]]"))  # not one that was cut short


def hashes(batch: Batch) -> Tensor:
    """Return a number (U,) for each written token that depends on nothing but the text up to its place."""
    ids_BS, mask_BS = batch.ids_BS * batch.mask_BS, batch.mask_BS
    places = ids_BS.cumsum(1) * MIX + mask_BS.cumsum(1) * (MIX >> 7)
    mixed = (places ^ (places >> 15)) * MIX & 0xFFFFFFFF
    return (mixed >> 11).flatten()[batch.predict_at_U]


def _key(ids: list[int], mask: list[int]) -> str:
    text = " ".join(str(i) for i, is_real in zip(ids, mask) if is_real)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
