"""The most memory that a call holds, beyond what was held before it; how much is left, and whether none is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from innerloop.phases.phase import phase

MIB = 2**20
LIMITS = (  # of a container or a job: what it may take, and what it has taken
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@phase("measuring memory")
def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that ``run`` holds at once on a device, beyond those held when it begins.

    Bytes are those of torch's own allocator: on CUDA its high-water mark, on a CPU every allocation and release as the
    profiler reports them, so that two runs give the same figure and what the rest of the process does is left out.
    Profiling slows the run down, so it is never timed together.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profiling(profile(activities=[ProfilerActivity.CPU], profile_memory=True)) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]  # torch's stubs leave it out
        peak = max(peak, held)
    return peak


@contextmanager
def profiling(profiler: profile) -> Iterator[profile]:
    """Profile a block, without the lines that the profiler's library writes to the standard error."""
    with _quietly():
        profiler.start()
    try:
        yield profiler
    finally:
        with _quietly():
            profiler.stop()


@contextmanager
def _quietly() -> Iterator[None]:
    """Send what a library writes to the process's standard error nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def free_bytes() -> int:
    """Return how many bytes of the machine's memory are left, to the container that this runs in if it is in one."""
    free = psutil.virtual_memory().available
    for limit, taken in LIMITS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(taken).read_text()))
        except (OSError, ValueError):  # there is no such limit, or it is "max"
            continue
    return max(free, 0)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory has run out; only on CUDA does torch have a type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in told for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
