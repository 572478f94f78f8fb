"""A teacher's states on disk: computed once for the training data, then read instead of running the teacher.

The file says which weights, data and positions it was made of; training with anything else refuses it. Shapes: `P`
positions of an example, `D` width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from innerloop.decoder.backbone import Backbone
from innerloop.disk.files import replacing
from innerloop.errors import InputError
from innerloop.passes.context import Context
from innerloop.phases.phase import phase
from innerloop.text.batch import collate
from innerloop.text.row import Row

STATES, MADE_OF = "states", "made_of"


class TeacherCache:
    """The states that the rows of a training set follow.

    Args:
        path: the file.
        rows: the laid-out training set; rows that are read by the teacher alike share an entry, which has the positions
            that any of them follows.
        backbone: the teacher, run only if the file is not there yet.
        pad_id: what fills padded columns.
        batch_size: rows that the teacher reads at once.

    Raises:
        InputError: the file was made of other weights, data or positions, or cannot be read.
    """

    def __init__(self, path: str | Path, rows: Sequence[Row], backbone: Backbone, pad_id: int, batch_size: int = 64):
        self.path = Path(path)
        read: dict[tuple[int, ...], Row] = {}
        followed: dict[tuple[int, ...], set[int]] = {}
        for row in rows:
            if row.teacher is not None and (at := positions(row)):
                key = tuple(row.teacher.ids())
                read[key] = row.teacher
                followed.setdefault(key, set()).update(at)
        self.places: dict[tuple[int, ...], tuple[int, list[int]]] = {}
        n = 0
        for key in sorted(read):  # the file does not depend on the order of the data
            self.places[key] = (n, sorted(followed[key]))
            n += len(followed[key])
        made_of = fingerprint(backbone, [(*key, -1, *at) for key, (_, at) in self.places.items()])
        if not self.path.exists():
            with phase(f"keeping the teacher's states of {len(read)} rows"):
                self._make([read[key] for key in self.places], backbone, pad_id, batch_size, made_of)
        try:
            self.file = safe_open(str(self.path), framework="pt")
            stored = (self.file.metadata() or {}).get(MADE_OF)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read the teacher's states in {self.path} ({error}); delete it") from None
        if stored != made_of:
            raise InputError(
                f"the states in {self.path} are of another teacher, other data or another method; delete the file, or "
                "give another one as train.teacher_cache"
            )
        self.states = self.file.get_slice(STATES)

    def _make(self, rows: list[Row], backbone: Backbone, pad_id: int, batch_size: int, made_of: str) -> None:
        parts = []
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            batch = collate(chosen, pad_id).to(backbone.device)
            with torch.no_grad():
                context = Context(backbone, len(batch))
                layers = context.read(backbone.embed(batch.ids_BS), batch.mask_BS, all_states=True)
            states_BSLD = torch.stack(layers, dim=2).cpu()
            first_B = (batch.mask_BS.cpu() > 0).int().argmax(1).tolist()
            for r, row in enumerate(chosen):
                _, at = self.places[tuple(row.ids())]
                parts.append(states_BSLD[r, first_B[r] + torch.tensor(at)])
        with replacing(self.path) as aside:
            save_file({STATES: torch.cat(parts)}, aside, metadata={MADE_OF: made_of})

    def states_of(self, row: Row) -> dict[int, Tensor]:
        """Return the states after every layer (n_layers + 1, D) at each position that a row follows; it may be none."""
        wanted = positions(row)
        if not wanted or row.teacher is None:
            return {}
        start, at = self.places[tuple(row.teacher.ids())]
        states = self.states[start : start + len(at)]
        return {position: states[at.index(position)] for position in wanted}


def positions(row: Row) -> list[int]:
    """Return the positions of the teacher's row that a row, and those it goes on with, follow."""
    return sorted({follow.teacher_at for segment in row.segments() for follow in segment.hidden_targets})


@phase("hashing weights")
def fingerprint(backbone: Backbone, entries: Iterable[tuple[int, ...]]) -> str:
    """Return a hash of a teacher's weights, and of what it reads with the positions that are followed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.lm.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for key in entries:
        digest.update(str(key).encode())
    return digest.hexdigest()
