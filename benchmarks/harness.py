"""`Row`: one race of ours against a named peer, run by turns, in CPU time, with the peak of memory beside.

Half of a plain implementation's CPU time can be page faults of freshly allocated memory, so a ratio holds
only for the allocator it was taken with: `TUNED_HEAP` is the environment of a heap that keeps its pages.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

TUNED_HEAP = {  # glibc: never give pages back, so that only the first allocation of a size faults
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}

Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """One race.

    Attributes:
        name: how the row is asked for on the command line.
        work: what both arms do: shapes, dtype, direction.
        peer: whose formulation the other arm runs.
        make: builds (our arm, the peer's); each does the work once and returns what it worked out.
        goal: ours is to be this many times as fast.
        memory_goal: and is to need at most this share of the peer's peak; None: no goal.
        tolerance: how far the two results may lie apart, as a share of the peer's norm; None: the networks
            are not the same.
        rounds: fewest alternations; a slow row may do with few.
    """

    name: str
    work: str
    peer: str
    make: Callable[[], tuple[Work, Work]]
    goal: float
    memory_goal: float | None = None
    tolerance: float | None = 1e-4
    rounds: int = 5


@dataclass(frozen=True)
class Outcome:
    """What a race showed: CPU seconds (median) and peak MiB of each arm."""

    name: str
    work: str
    peer: str
    ours: float
    theirs: float
    our_peak: float
    their_peak: float
    goal: float
    memory_goal: float | None

    @property
    def faster(self) -> float:
        """How many times as fast as the peer."""
        return self.theirs / self.ours

    @property
    def share(self) -> float:
        """Our peak of memory over the peer's."""
        return self.our_peak / max(self.their_peak, 1e-9)

    @property
    def met(self) -> bool:
        """Both goals reached."""
        return self.faster >= self.goal and (self.memory_goal is None or self.share <= self.memory_goal)


def forward(module: nn.Module, *inputs: Tensor) -> Work:
    """An arm that runs `module` without gradients."""

    def work() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (module(*inputs),)

    return work


def forward_backward(module: nn.Module, x: Tensor) -> Work:
    """An arm that runs `module` and all gradients; returns the output and the gradient to `x`."""
    with torch.no_grad():
        shape = module(x).shape
    torch.manual_seed(7)
    direction = torch.randn(shape, dtype=x.dtype, device=x.device)

    def work() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        module.zero_grad(set_to_none=True)
        y = module(leaf)
        y.backward(direction)
        assert leaf.grad is not None
        return y.detach(), leaf.grad

    return work


def peak_mib(work: Work) -> float:
    """The most memory (MiB) the tensors made by `work` held at once, from every allocation torch made."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def race(row: Row, seconds: float = 8.0) -> Outcome:
    """Runs both arms by turns for about `seconds` of CPU time, on one thread.

    Raises:
        ValueError: if the two arms do not work out the same.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arms = row.make()
        results = [arm() for arm in arms]
        _check_same(row, *results)
        del results
        peaks = [peak_mib(arm) for arm in arms]
        times: tuple[list[float], list[float]] = ([], [])
        spent = 0.0
        while len(times[0]) < row.rounds or (spent < seconds and len(times[0]) < 100):
            for arm, taken in zip(arms, times, strict=True):
                start = time.process_time()
                result = arm()
                taken.append(time.process_time() - start)
                del result
                spent += taken[-1]
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (statistics.median(taken) for taken in times)
    return Outcome(row.name, row.work, row.peer, ours, theirs, peaks[0], peaks[1], row.goal, row.memory_goal)


def _check_same(row: Row, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    if row.tolerance is None:
        return
    for mine, other in zip(ours, theirs, strict=True):
        apart = ((mine - other).norm() / other.norm().clamp_min(1e-30)).item()
        if not apart <= row.tolerance:
            raise ValueError(
                f"{row.name}: the two arms differ by {apart:.2g} of their norm, "
                f"more than {row.tolerance:.2g}: they do not do the same work"
            )


def machine() -> str:
    """What the numbers hold for: processor, torch, heap, load."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    tuned = all(os.environ.get(key) == value for key, value in TUNED_HEAP.items())
    heap = "tuned heap" if tuned else "default heap"
    return (
        f"{cpu}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, 1 thread, {heap}, load {os.getloadavg()[0]:.1f}"
    )
