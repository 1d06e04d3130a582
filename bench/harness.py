"""How the benchmarks measure: timing protocol, byte accounting, bandwidth probe, peak memory.

**Protocol.** All contenders of a case live in one process and are timed round-robin, in an order that is shuffled anew
(but seeded) in every round, so that a slow minute of the machine meets all of them. Reported are medians and quartiles.
A ratio of two contenders is the median of their ratios round by round, not the ratio of two medians: it holds when the
machine drifts. Slow contenders take part in fewer rounds, evenly spread. Reported as well is what other processes took
of the CPUs meanwhile: a threaded step waits for its slowest thread, and one busy neighbour can cost it milliseconds.

**Cold caches.** Before every sample a buffer of 1.25 times the last-level cache (on CUDA: 4 times L2) is rewritten.
The contenders share weights and gradients, which saves memory, and nobody finds them in cache. The walk writes, so that
a sample starts with a cache full of dirty lines, as after a backward pass, and pays for its own writes. With 480 MiB of
L3, a read-modify-write of 42 MB ran at 102 GB/s without a walk and at 45 GB/s after it, one of 671 MB at 52 GB/s
either way.

**Bytes.** An algorithm must read each operand once and write each changed operand once; what an implementation moves
beyond that counts against it. GB/s is those bytes divided by the time.

**Bandwidth.** The yardstick is an in-place `mul_` over five arrays of 134 MB, one after the other, timed as one more
contender: 8 bytes an element. It is threaded and needs no compiler. Tiny C loops on the same memory (2 cores, AVX-512)
reached 0.95 times its bandwidth with one array at a time, 1.04 times with five at once, and 0.98 times with five of
which four are written, as in PACE. So it is a fair yardstick and no hard limit: shares a little above 1 are possible.
The factor is −1 because storing unchanged bits, zeros above all, is cheaper on some CPUs.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MIB = 2**20
PROBE_ARRAYS = 5
PROBE_ELEMENTS = 32 * MIB  # of each array: 134 MB, 671 MB together, what PACE holds for 32 M float32 parameters
MIN_ROUNDS = 5
SECONDS_A_CONTENDER = 4.0  # those slower than this over all rounds get fewer, but never fewer than MIN_ROUNDS
WARM_UP = 2  # calls before the first sample, beyond the first step


# --- byte accounting ------------------------------------------------------------------------------------------------


def itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def moved_bytes(
    dtype: torch.dtype, states: int, *, state_dtype: torch.dtype | None = torch.float32, read_only: int = 0
) -> int:
    """Bytes a parameter that one step must move: the weights read and written, the gradient read, `states` read and
    written, `read_only` further states only read. `state_dtype=None`: states in the parameters' format.

    >>> moved_bytes(torch.float32, 3), moved_bytes(torch.bfloat16, 3)  # PACE: m, v, e
    (36, 30)
    """
    return 3 * itemsize(dtype) + (2 * states + read_only) * itemsize(state_dtype or dtype)


def held_bytes(dtype: torch.dtype, states: int, *, state_dtype: torch.dtype | None = torch.float32) -> int:
    """Bytes of state a parameter, beside weights and gradient."""
    return states * itemsize(state_dtype or dtype)


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of mappings and sequences, such as an optimizer's `state`."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


def bytes_of(state: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(state))


# --- contenders -----------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """Something set up and ready to be timed."""

    step: Callable[[], object]
    state: Callable[[], Any] = dict  # the tensors it keeps, as a nest of mappings and sequences


@dataclass(frozen=True)
class Row:
    """A contender as data. `moved`, `held`, `scratch` are bytes a parameter, given the parameters' format."""

    key: str
    name: str
    make: Callable[[list[nn.Parameter]], Contender]
    moved: Callable[[torch.dtype], int]
    held: Callable[[torch.dtype], int]  # states; decides with `scratch` which contenders fit into memory together
    scratch: int = 0  # temporaries at the peak of a step, an upper bound
    note: str = ""
    compiles: bool = False  # in its first step: then the table tells how long, or why this machine cannot


@dataclass
class Result:
    row: Row
    missing: str = ""  # why there are no numbers
    first_step_s: float = 0.0
    samples: dict[int, float] = field(default_factory=dict)  # round -> seconds
    peak_extra: int | None = None  # bytes
    state_bytes: int = 0


@dataclass
class Case:
    """What one list of shapes in one format gave."""

    title: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    probe_bytes: int
    results: list[Result]
    probe_samples: dict[int, float] = field(default_factory=dict)  # round -> seconds
    others_busy: float = 0.0  # CPUs that other processes kept busy while the samples were taken

    @property
    def numel(self) -> int:
        return sum(map(count, self.shapes))

    def result(self, key: str) -> Result | None:
        """The row's result, if it was measured."""
        return next((r for r in self.results if r.row.key == key and r.samples), None)

    def bandwidth(self) -> float:
        """Read-modify-write bytes per second of the probe, median."""
        return self.probe_bytes / quartiles(self.probe_samples)[1]

    def rate(self, result: Result) -> float:
        """Bytes per second, of those that the algorithm must move, median."""
        return result.row.moved(self.dtype) * self.numel / quartiles(result.samples)[1]

    def share(self, result: Result) -> float:
        """Share of the read-modify-write bandwidth, median over the rounds."""
        bytes_ratio = result.row.moved(self.dtype) * self.numel / self.probe_bytes
        return bytes_ratio * ratio(self.probe_samples, result.samples)[1]


def count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def quartiles(samples: Mapping[int, float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    values = list(samples.values())
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float, float, float]:
    """Quartiles of a / b over the rounds in which both were timed."""
    return quartiles({k: a[k] / b[k] for k in a.keys() & b.keys()})


# --- timing ---------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call. On CUDA from the moment it is issued on an idle device to the end of its last kernel."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
    seed: int = 0,
    budget_s: float = SECONDS_A_CONTENDER,
) -> dict[str, dict[int, float]]:
    """Times every call once a round, in shuffled order, `before` each sample; name -> round -> seconds.

    A call that would take longer than `budget_s` over all rounds takes part in fewer.
    """
    takes_part: dict[str, set[int]] = {}
    for name, call in calls.items():
        fastest = float("inf")
        for _ in range(WARM_UP):
            before()
            fastest = min(fastest, seconds(call, device))
        n = min(rounds, max(MIN_ROUNDS, int(budget_s / max(fastest, 1e-9))))
        takes_part[name] = {i * rounds // n for i in range(n)}

    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    gc.collect()
    gc.disable()  # a collection inside a sample would be charged to whoever is on
    try:
        for i in range(rounds):
            shuffle(order)
            for name in order:
                if i in takes_part[name]:
                    before()
                    samples[name][i] = seconds(calls[name], device)
    finally:
        gc.enable()
    return samples


class ColdWalk:
    """Rewrites a buffer larger than the last-level cache when called."""

    def __init__(self, device: torch.device, nbytes: int | None = None) -> None:
        if nbytes is None and device.type == "cuda":
            nbytes = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        elif nbytes is None:
            nbytes = last_level_cache() * 5 // 4
        self.buffer = torch.empty(nbytes // 4, device=device)
        fill_(self.buffer)

    def __call__(self) -> None:
        self.buffer.mul_(-1.0)


class BandwidthProbe:
    """A read-modify-write pass over several arrays when called."""

    def __init__(self, device: torch.device, elements: int = PROBE_ELEMENTS) -> None:
        self.arrays = [torch.empty(elements, device=device) for _ in range(PROBE_ARRAYS)]
        for array in self.arrays:
            fill_(array)
        self.nbytes = 8 * PROBE_ARRAYS * elements

    def __call__(self) -> None:
        for array in self.arrays:
            array.mul_(-1.0)


# --- peak memory ----------------------------------------------------------------------------------------------------


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Memory that one call needs beyond what is held before it, at its peak; None where it cannot be measured.

    On CUDA from torch's allocator. On Linux from the process's resident-set high-water mark, which sees every
    allocation that is touched, torch's and the kernels' own; free heap is given back first, or temporaries that fit
    into it would go unseen. Resolution: the kernel's counters, about 0.3 MB with 2 CPUs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: the high-water mark becomes the present size
        held = high_water_mark()
        call()
        return max(0, high_water_mark() - held)
    except OSError:
        return None


def high_water_mark() -> int:
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError("/proc/self/status has no VmHWM")
    return 1024 * int(match[1])


def available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return 1024 * int(match[1]) if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


# --- a case ---------------------------------------------------------------------------------------------------------


def fill_(tensor: Tensor) -> Tensor:
    """Normal random numbers, one block repeated: 124 M drawn one by one would take seconds."""
    flat = tensor.view(-1)
    block = torch.randn(min(flat.numel(), 65536), generator=torch.Generator().manual_seed(0)).to(tensor)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block.expand(whole // block.numel(), -1))
    flat[whole:].copy_(block[: flat.numel() - whole])
    return tensor


def make_parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    parameters = [nn.Parameter(fill_(torch.empty(s, dtype=dtype, device=device))) for s in shapes]
    for p in parameters:
        p.grad = p.detach().flip(0) * 0.1
    return parameters


def waves(rows: Sequence[Row], anchors: Sequence[str], fits: Callable[[list[Row]], bool]) -> list[list[Row]]:
    """Cuts `rows` into runs that fit into memory together; the anchors, to which others are compared, are in each."""
    fixed = [r for r in rows if r.key in anchors]
    others = [r for r in rows if r.key not in anchors]
    cut = [list(fixed)]
    for row in others:
        if len(cut[-1]) > len(fixed) and not fits([*cut[-1], row]):
            cut.append(list(fixed))
        cut[-1].append(row)
    return cut


def measure(
    title: str,
    rows: Sequence[Row],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    walk: ColdWalk,
    probe: BandwidthProbe,
    anchors: Sequence[str] = (),
    seed: int = 0,
) -> Case:
    """Times the rows on tensors of these shapes. Rows that do not fit into memory together take turns."""
    results = {row.key: Result(row) for row in rows}
    case = Case(title, list(shapes), dtype, probe.nbytes, list(results.values()))
    parameters = make_parameters(shapes, dtype, device)

    def need(some: list[Row]) -> float:
        return case.numel * (sum(r.held(dtype) for r in some) + max(r.scratch for r in some))

    def run(wave: list[Row], first_round: int) -> None:
        contenders: dict[str, Contender] = {}
        for row in wave:
            try:
                contender = row.make(parameters)
                results[row.key].first_step_s = seconds(contender.step, device)
            except Exception as reason:
                if not row.compiles:
                    raise
                results[row.key].missing = f"{type(reason).__name__}: {reason}".splitlines()[0]
                continue
            contenders[row.key] = contender
        calls: dict[str, Callable[[], object]] = {key: c.step for key, c in contenders.items()}
        calls["probe"] = probe
        others_s, start_s = others_cpu_seconds(), time.perf_counter()
        samples = time_interleaved(calls, device, rounds=rounds, before=walk, seed=seed + first_round)
        busy = (others_cpu_seconds() - others_s) / (time.perf_counter() - start_s)
        case.others_busy = max(case.others_busy, busy)
        for key, of_key in samples.items():
            kept = case.probe_samples if key == "probe" else results[key].samples
            kept.update({first_round + i: s for i, s in of_key.items()})
        for key, contender in contenders.items():
            results[key].peak_extra = peak_extra_bytes(contender.step, device)
            results[key].state_bytes = bytes_of(contender.state())

    gc.collect()  # of an earlier case
    budget = 0.85 * available_memory(device)
    too_large = [row for row in rows if need([row]) > budget]
    for row in too_large:
        results[row.key].missing = f"needs {need([row]) / 1e9:.1f} GB, {budget / 1e9:.1f} GB can be had"
    possible = [row for row in rows if row not in too_large]
    for i, wave in enumerate(waves(possible, anchors, lambda some: need(some) <= budget)):
        run(wave, first_round=i * rounds)
    return case


# --- the machine ----------------------------------------------------------------------------------------------------


def last_level_cache() -> int:
    """Bytes, or 64 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)K", path.read_text().strip())
        if match:
            sizes.append(1024 * int(match[1]))
    return max(sizes, default=64 * MIB)


def cpu_model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def others_cpu_seconds() -> float:
    """CPU time so far that did not go to this process, the host's share on a virtual machine included; 0 if unknown."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, *interrupts_and_stolen = ticks
    own = os.times()
    everyone = sum((user, nice, system, *interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    return everyone - own.user - own.system


def machine(device: torch.device) -> dict[str, Any]:
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    info: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache(),
        "transparent_huge_pages": huge.read_text().strip() if huge.exists() else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
        info["cuda"] = torch.version.cuda
    return info


# --- the report -----------------------------------------------------------------------------------------------------


def table(case: Case, anchors: Mapping[str, str]) -> str:
    """The case as text. `anchors`: key -> heading of a column with the ratio to that row's time."""
    heads = ["", "ms", "quartiles", "ns/param", "B/param", "GB/s", "of rmw", *anchors.values()]
    heads += ["peak extra MB", "state B/param", "rounds"]
    lines, notes = [heads], []
    for result in case.results:
        row = result.row
        if result.samples:
            low, middle, high = quartiles(result.samples)
            against = [case.result(key) for key in anchors]
            peak = "?" if result.peak_extra is None else f"{result.peak_extra / 1e6:.1f}"
            lines.append(
                [
                    row.name,
                    f"{1e3 * middle:.2f}",
                    f"{1e3 * low:.2f} – {1e3 * high:.2f}",
                    f"{1e9 * middle / case.numel:.3f}",
                    f"{row.moved(case.dtype)}",
                    f"{case.rate(result) / 1e9:.1f}",
                    f"{100 * case.share(result):.0f} %",
                    *(
                        "–" if other is None else f"{ratio(result.samples, other.samples)[1]:.2f} ×"
                        for other in against
                    ),
                    peak,
                    f"{result.state_bytes / case.numel:.2f}",
                    f"{len(result.samples)}",
                ]
            )
        else:
            lines.append([row.name, "–"] + [""] * (len(heads) - 2))
        if result.missing:
            notes.append(f"  {row.name}: not measured, {result.missing}")
        elif row.compiles:
            notes.append(f"  {row.name}: the first step, which compiles, took {result.first_step_s:.1f} s")
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = [
        f"{case.title}, {str(case.dtype).removeprefix('torch.')}: {case.numel:,} parameters in "
        f"{len(case.shapes):,} tensor{'s' * (len(case.shapes) > 1)}; "
        f"read-modify-write bandwidth {case.bandwidth() / 1e9:.1f} GB/s; "
        f"other processes kept {case.others_busy:.1f} CPUs busy"
    ]
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text + notes)


def as_json(case: Case) -> dict[str, Any]:
    rows = []
    for result in case.results:
        row = result.row
        entry: dict[str, Any] = {"key": row.key, "name": row.name, "missing": result.missing}
        if result.samples:
            low, middle, high = quartiles(result.samples)
            entry |= {
                "seconds_median": middle,
                "seconds_quartiles": [low, high],
                "ns_per_parameter": 1e9 * middle / case.numel,
                "bytes_moved_per_parameter": row.moved(case.dtype),
                "gb_per_s": case.rate(result) / 1e9,
                "share_of_rmw_bandwidth": case.share(result),
                "peak_extra_bytes": result.peak_extra,
                "state_bytes_per_parameter": result.state_bytes / case.numel,
                "first_step_s": result.first_step_s,
                "samples_s": result.samples,
            }
        rows.append(entry)
    return {
        "title": case.title,
        "dtype": str(case.dtype).removeprefix("torch."),
        "parameters": case.numel,
        "tensors": len(case.shapes),
        "rmw_bandwidth_bytes_per_s": case.bandwidth(),
        "probe_bytes": case.probe_bytes,
        "probe_samples_s": case.probe_samples,
        "other_processes_busy_cpus": case.others_busy,
        "rows": rows,
    }
