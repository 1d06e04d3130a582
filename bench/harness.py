"""How the benchmarks measure: timing protocol, byte accounting, bandwidth probe, peak memory.

**Protocol.** All contenders of a case live in one process and are timed round-robin, in an order that is shuffled anew
(but seeded) in every round, so that a slow minute of the machine meets all of them. Reported are medians and quartiles.
A ratio of two contenders is the median of their ratios round by round, not the ratio of two medians: it holds when the
machine drifts. Slow contenders take part in fewer rounds, evenly spread. Reported as well is what other processes took
of the CPUs meanwhile: a threaded step waits for its slowest thread, and one busy neighbour can cost it milliseconds.

**On a GPU** a step has three times. "kernel ms" is that between events in the stream before and after it: several steps
a sample, each behind a cold walk, and behind a wait of the device as long as Python takes to issue the step, so that
the kernels alone are in it, as behind a long backward pass. (With more than some 1,000 launches the host waits for the
queue, and that is in it too.) "host ms" is how long Python was busy with these steps. "idle ms" is from the call on an
idle device, after a walk, to the end of its last kernel: what a step takes where nothing hides its host time. "by
bytes" is the time that a row's bytes would take at the bandwidth of the same run.

**Cold caches.** Before every step a buffer of 1.25 times the last-level cache (on a GPU: 4 times L2) is rewritten.
The contenders share weights and gradients, which saves memory, and nobody finds them in cache. The walk writes, so that
a sample starts with a cache full of dirty lines, as after a backward pass, and pays for its own writes. With 480 MiB of
L3, a read-modify-write of 42 MB ran at 102 GB/s without a walk and at 45 GB/s after it, one of 671 MB at 52 GB/s
either way.

**Bytes.** An algorithm must read each operand once and write each changed operand once; what an implementation moves
beyond that counts against it. GB/s is those bytes divided by the time.

**Bandwidth.** The yardstick is an in-place `mul_` over five arrays of 134 MB, one after the other, timed as one more
contender: 8 bytes an element. On a GPU copies within such arrays are timed beside it. On the CPU `mul_` is threaded and
needs no compiler. Tiny C loops on the same memory (2 cores, AVX-512) reached 0.95 times its bandwidth with one array at
a time, 1.04 times with five at once, and 0.98 times with five of which four are written, as in PACE. So it is a fair
yardstick and no hard limit: shares a little above 1 are possible. The factor is −1 because storing unchanged bits,
zeros above all, is cheaper on some CPUs.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import lzma
import math
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MIB = 2**20
PROBE_ARRAYS = 5
PROBE_ELEMENTS = 32 * MIB  # of each array: 134 MB, 671 MB together, what PACE holds for 32 M float32 parameters
MIN_ROUNDS = 5
SECONDS_A_CONTENDER = 4.0  # those slower than this over all rounds get fewer, but never fewer than MIN_ROUNDS
WARM_UP = 2  # calls before the first sample, beyond the first step
# Bytes of the walk where the caches beyond L2 are not known: AMD's Infinity Cache, 256 MiB on an MI300X, is not in what
# torch says about L2.
HIP_WALK_BYTES = 512 * MIB


# ---- byte accounting ----


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
    """Every tensor in a nest of mappings and sequences, such as an optimizer's `state`. Of one that is made of others,
    as quantized ones are, those."""
    if hasattr(state, "__tensor_flatten__"):
        names, _ = state.__tensor_flatten__()
        yield from tensors_in([getattr(state, name) for name in names])
    elif isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


def bytes_of(state: Any) -> int:
    """Of memory that several entries share, once."""
    found = {(t.data_ptr(), t.numel() * t.element_size()) for t in tensors_in(state)}
    return sum(nbytes for _, nbytes in found)


# ---- contenders ----


def nothing(*_: object) -> None:
    pass


@dataclass
class Contender:
    """Something set up and ready to be timed."""

    step: Callable[[], object]
    state: Callable[[], Any] = dict  # the tensors it keeps, as a nest of mappings and sequences
    prepare: Callable[[], object] = nothing  # before each step, not timed


@dataclass(frozen=True)
class Row:
    """A contender as data. `moved`, `held`, `scratch` are bytes a parameter, given the parameters' format."""

    key: str
    name: str
    make: Callable[[list[nn.Parameter]], Contender]
    moved: Callable[[torch.dtype], int]
    held: Callable[[torch.dtype], int]  # states; decides with `scratch` which contenders fit into memory together
    scratch: int = 0  # temporaries at the peak of a step, an upper bound
    scratch_of_one: int = 0  # the same, where they are those of one tensor at a time
    note: str = ""
    compiles: bool = False  # in its first step: then the table tells how long, or why this machine cannot


@dataclass
class Result:
    row: Row
    missing: str = ""  # why there are no numbers
    first_step_s: float = 0.0
    samples: dict[int, float] = field(default_factory=dict)  # round -> seconds
    host_samples: dict[int, float] = field(default_factory=dict)  # round -> seconds in which Python was busy
    idle_samples: dict[int, float] = field(default_factory=dict)  # round -> seconds on an idle GPU
    peak_extra: int | None = None  # bytes
    state_bytes: int = 0


class DeviceLost(RuntimeError):
    """The device answers nothing any more in this process, as after an illegal memory access."""


@dataclass
class Watch:
    """Who follows a run, and how far it may go."""

    row: Callable[[str], object] = nothing  # is told the key of the row that is about to run
    progress: Callable[[Case], object] = nothing  # gets the case with what it has by now, after every round
    keep_going: bool = False  # a row that fails is a row with the reason
    deadline: float = math.inf  # of time.monotonic(): then no row and no round is started any more

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline


@dataclass
class Case:
    """What one list of shapes in one format gave."""

    title: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    probe_bytes: int
    results: list[Result]
    probe_samples: dict[int, float] = field(default_factory=dict)  # round -> seconds
    copy_bytes: int = 0
    copy_samples: dict[int, float] = field(default_factory=dict)  # round -> seconds, where copies are timed
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

    def copy_bandwidth(self) -> float | None:
        """Bytes read and written per second by a copy, median, where copies were timed."""
        return self.copy_bytes / quartiles(self.copy_samples)[1] if self.copy_samples else None

    def rate(self, result: Result) -> float:
        """Bytes per second, of those that the algorithm must move, median."""
        return result.row.moved(self.dtype) * self.numel / quartiles(result.samples)[1]

    def share(self, result: Result) -> float:
        """Share of the read-modify-write bandwidth, median over the rounds."""
        bytes_ratio = result.row.moved(self.dtype) * self.numel / self.probe_bytes
        return bytes_ratio * ratio(self.probe_samples, result.samples)[1]

    def against(self, result: Result, key: str) -> float | None:
        """The row's time over that of row `key`, median over the rounds; None where no round has both."""
        other = self.result(key)
        if other is None or not result.samples.keys() & other.samples.keys():
            return None
        return ratio(result.samples, other.samples)[1]


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


# ---- timing ----


class Sample(NamedTuple):
    seconds: float
    host_seconds: float  # those in which Python was busy; the same on the CPU
    idle_seconds: float  # of a call on an idle device, to the end of its last kernel; the same on the CPU


def timed(
    call: Callable[[], object],
    device: torch.device,
    steps: int = 1,
    before: Callable[[], object] = nothing,
    hidden_s: float = 0.0,
) -> Sample:
    """Mean over `steps` calls, with `before` each, which is not counted.

    On CUDA from the end of what was issued before a call to the end of its own last kernel, where the device waits
    `hidden_s` before it begins; and the time of one call more on an idle device.
    """
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
        host = 0.0
        torch.cuda.synchronize(device)
        for start, end in events:
            before()
            torch.cuda._sleep(int(2e9 * hidden_s))  # clock cycles, of which a GPU has up to 2e9 a second
            start.record()
            start_s = time.perf_counter()
            call()
            host += time.perf_counter() - start_s
            end.record()
        before()
        torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        idle = time.perf_counter() - start_s
        return Sample(sum(start.elapsed_time(end) for start, end in events) / 1e3 / steps, host / steps, idle)
    total = 0.0
    for _ in range(steps):
        before()
        start_s = time.perf_counter()
        call()
        total += time.perf_counter() - start_s
    return Sample(total / steps, total / steps, total / steps)


def spread_out(rounds: int, n: int) -> set[int]:
    """So many of the rounds, spread over all of them; fewer are a subset of more. By reversed bits (van der Corput)."""
    bits = rounds.bit_length()
    return set(sorted(range(rounds), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))[:n])


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    keep: Callable[[str, int, Sample], object],
    failed: Callable[[str, Exception], object],
    steps: int = 1,
    before: Callable[[], object] = nothing,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    after_round: Callable[[], object] = nothing,
    seed: int = 0,
    budget_s: float = SECONDS_A_CONTENDER,
    watch: Watch | None = None,
) -> None:
    """Times every call once a round, in shuffled order; `keep` gets name, round and sample. Not timed are `before`,
    ahead of each step, and what `prepare` has for a call, ahead of that.

    A call that would take longer than `budget_s` over all rounds takes part in fewer, all of which those have that take
    part in more. One that raises is handed to `failed`, and takes part no more if that returns.
    """
    watch = watch or Watch()
    takes_part: dict[str, set[int]] = {}
    hidden: dict[str, float] = {}

    def ahead_of(name: str) -> Callable[[], object]:
        first = (prepare or {}).get(name)
        return before if first is None else lambda: (first(), before())

    for name, call in calls.items():
        fastest = math.inf
        watch.row(name)
        try:
            for _ in range(WARM_UP):
                sample = timed(call, device, before=ahead_of(name))
                fastest = min(fastest, max(sample.seconds, sample.host_seconds))
                hidden[name] = 1.2 * sample.host_seconds + 1e-4
        except Exception as reason:
            failed(name, reason)
            continue
        n = min(rounds, max(MIN_ROUNDS, int(budget_s / max(fastest * steps, 1e-9))))
        takes_part[name] = spread_out(rounds, n)

    order, shuffle = list(takes_part), random.Random(seed).shuffle
    gc.collect()
    gc.disable()  # a collection inside a sample would be charged to whoever is on
    try:
        for i in range(rounds):
            shuffle(order)
            for name in list(order):
                if i not in takes_part[name] or (i > 0 and watch.is_late()):
                    continue
                watch.row(name)
                try:
                    keep(name, i, timed(calls[name], device, steps, ahead_of(name), hidden[name]))
                except Exception as reason:
                    failed(name, reason)
                    order.remove(name)
            after_round()
    finally:
        gc.enable()


class ColdWalk:
    """Rewrites a buffer larger than the last-level cache when called."""

    def __init__(self, device: torch.device, nbytes: int | None = None) -> None:
        if nbytes is None and device.type == "cuda":
            hip = torch.version.hip is not None
            nbytes = HIP_WALK_BYTES if hip else 4 * torch.cuda.get_device_properties(device).L2_cache_size
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


class CopyProbe:
    """A copy of the upper half of a probe's arrays over the lower when called."""

    def __init__(self, arrays: Sequence[Tensor]) -> None:
        self.pairs = [array.chunk(2) for array in arrays]
        self.nbytes = sum(2 * low.numel() * low.element_size() for low, _ in self.pairs)

    def __call__(self) -> None:
        for low, high in self.pairs:
            low.copy_(high)


# ---- peak memory ----


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


# ---- a case ----


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
    """Cuts `rows` into runs that fit into memory together; the anchors, to which others are compared, are in each, but
    where a row leaves no room for them."""
    fixed = [r for r in rows if r.key in anchors]
    if not fits(fixed):
        fixed = []
    cut = [list(fixed)]
    alone = []
    for row in rows:
        if row in fixed:
            continue
        if not fits([*fixed, row]):
            alone.append([row])
            continue
        if not fits([*cut[-1], row]):
            cut.append(list(fixed))
        cut[-1].append(row)
    return [wave for wave in cut if wave] + alone


def in_short(reason: BaseException) -> str:
    first, *_ = str(reason).splitlines() or [""]
    return f"{type(reason).__name__}: {first}"


def check_alive(device: torch.device) -> None:
    """Raises DeviceLost where a failure left the device in a state that this process cannot leave."""
    if device.type != "cuda":
        return
    gc.collect()  # what the failed row held
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as reason:
        raise DeviceLost(in_short(reason)) from reason


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
    copy: CopyProbe | None = None,
    anchors: Sequence[str] = (),
    steps: int = 1,
    seed: int = 0,
    excluded: Mapping[str, str] | None = None,
    watch: Watch | None = None,
) -> Case:
    """Times the rows on tensors of these shapes. Rows that do not fit into memory together take turns.

    `excluded`: keys of rows that are not to run, with the reason.
    """
    watch = watch or Watch()
    results = {row.key: Result(row, (excluded or {}).get(row.key, "")) for row in rows}
    case = Case(title, list(shapes), dtype, probe.nbytes, list(results.values()))
    case.copy_bytes = copy.nbytes if copy else 0
    parameters = make_parameters(shapes, dtype, device)
    largest = max(map(count, shapes))

    def need(some: list[Row]) -> float:
        held = case.numel * sum(r.held(dtype) for r in some)
        return held + max((case.numel * r.scratch + largest * r.scratch_of_one for r in some), default=0)

    def failed(key: str, reason: Exception) -> None:
        if key not in results or not (results[key].row.compiles or watch.keep_going):
            raise reason
        results[key].missing = in_short(reason)
        watch.progress(case)
        check_alive(device)

    def run(wave: list[Row], first_round: int) -> None:
        contenders: dict[str, Contender] = {}
        for row in wave:
            if watch.is_late():
                results[row.key].missing = results[row.key].missing or "the time was up"
                continue
            watch.row(row.key)
            try:
                contender = row.make(parameters)
                contender.prepare()
                results[row.key].first_step_s = timed(contender.step, device).seconds
            except Exception as reason:
                failed(row.key, reason)
                continue
            contenders[row.key] = contender
        calls: dict[str, Callable[[], object]] = {key: c.step for key, c in contenders.items()}
        calls["probe"] = probe
        if copy is not None:
            calls["copy"] = copy

        def keep(key: str, i: int, sample: Sample) -> None:
            sample = Sample(*map(significant, sample))  # as files have them
            if key in results:
                results[key].samples[first_round + i] = sample.seconds
                results[key].host_samples[first_round + i] = sample.host_seconds
                results[key].idle_samples[first_round + i] = sample.idle_seconds
            else:
                kept = case.probe_samples if key == "probe" else case.copy_samples
                kept[first_round + i] = sample.seconds

        others_s, start_s = others_cpu_seconds(), time.perf_counter()
        time_interleaved(
            calls,
            device,
            rounds=rounds,
            keep=keep,
            failed=failed,
            steps=steps,
            before=walk,
            prepare={key: c.prepare for key, c in contenders.items()},
            after_round=lambda: watch.progress(case),
            seed=seed + first_round,
            watch=watch,
        )
        busy = (others_cpu_seconds() - others_s) / (time.perf_counter() - start_s)
        case.others_busy = max(case.others_busy, busy)
        for key, contender in contenders.items():
            if not results[key].missing:
                watch.row(key)
                contender.prepare()
                results[key].peak_extra = peak_extra_bytes(contender.step, device)
                results[key].state_bytes = bytes_of(contender.state())

    gc.collect()  # of an earlier case
    budget = 0.85 * available_memory(device)
    possible = []
    for row in rows:
        if results[row.key].missing:
            continue
        if need([row]) > budget:
            results[row.key].missing = f"needs {need([row]) / 1e9:.1f} GB, {budget / 1e9:.1f} GB can be had"
        else:
            possible.append(row)
    for i, wave in enumerate(waves(possible, anchors, lambda some: need(some) <= budget)):
        run(wave, first_round=i * rounds)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    watch.progress(case)
    return case


# ---- the machine ----


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
        "system": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
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


def slug(about: Mapping[str, Any]) -> str:
    """The device in a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", (about.get("gpu") or about["cpu"]).lower()).strip("-")


# ---- files ----


def write(path: Path, text: str) -> None:
    """Whole or not at all, so that a reader never meets half a file."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def compact(value: Any, indent: str = "") -> str:
    """As JSON: what contains no other container stands in one line."""
    if isinstance(value, Mapping):
        parts = [f"{json.dumps(str(key))}: {compact(part, indent + ' ')}" for key, part in value.items()]
        inner, brackets = value.values(), "{}"
    elif isinstance(value, list | tuple):
        parts, inner, brackets = [compact(part, indent + " ") for part in value], value, "[]"
    else:
        return json.dumps(value)
    if any(isinstance(part, Mapping | list | tuple) for part in inner):
        parts = [f"\n{indent} {part}" for part in parts]
        return f"{brackets[0]}{','.join(parts)}\n{indent}{brackets[1]}"
    return f"{brackets[0]}{', '.join(parts)}{brackets[1]}"


def save(numbers: Mapping[str, Any], path: Path) -> None:
    write(path, compact(numbers) + "\n")


def packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.xz")


def load(path: Path) -> dict[str, Any]:
    """The JSON file, or where there is none the packed one."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return json.loads(lzma.decompress(packed(path).read_bytes()))


TEXT = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}]


def pack(path: Path) -> None:
    """Results that are kept with the code: a tenth of the size, with numbers of 7 digits at most."""
    text = compact(rounded(load(path), 7)) + "\n"
    packed(path).write_bytes(lzma.compress(text.encode(), check=lzma.CHECK_CRC32, filters=TEXT))
    path.unlink()


def rounded(value: Any, digits: int) -> Any:
    """The nest of mappings and lists with every float rounded."""
    if isinstance(value, Mapping):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    return significant(value, digits) if isinstance(value, float) else value


def significant(value: float, digits: int = 6) -> float:
    """Rounded: a file of samples is mostly digits. Those of a time differ in the second or third."""
    return float(f"{value:.{digits}g}")


# ---- the report ----


def cells(case: Case, anchors: Mapping[str, str]) -> list[list[str]]:
    """The case as rows of text, the first one the headings. `anchors`: key -> heading of a column with the ratio to
    that row's time."""
    copies = bool(case.copy_samples)  # as on a GPU
    idle = copies and any(result.idle_samples for result in case.results)  # not in results of before
    heads = ["", "kernel ms" if idle else "ms", "quartiles", *(["by bytes"] if idle else [])]
    heads += [*(["host ms"] if copies else []), *(["idle ms"] if idle else []), "ns/param", "B/param", "GB/s", "of rmw"]
    heads += [*(["of copy"] if copies else []), *anchors.values(), "peak extra MB", "state B/param", "rounds"]
    lines = [heads]
    for result in case.results:
        row = result.row
        if not result.samples or not case.probe_samples:
            lines.append([row.name, "–"] + [""] * (len(heads) - 2))
            continue
        low, middle, high = quartiles(result.samples)
        ratios = [case.against(result, key) for key in anchors]
        line = [row.name, f"{1e3 * middle:.2f}", f"{1e3 * low:.2f} – {1e3 * high:.2f}"]
        if idle:
            line.append(f"{1e3 * row.moved(case.dtype) * case.numel / case.bandwidth():.2f}")
        if copies:
            line.append(f"{1e3 * quartiles(result.host_samples)[1]:.2f}")
        if idle:
            line.append(f"{1e3 * quartiles(result.idle_samples)[1]:.2f}" if result.idle_samples else "–")
        line += [f"{1e9 * middle / case.numel:.3f}", f"{row.moved(case.dtype)}", f"{case.rate(result) / 1e9:.1f}"]
        line.append(f"{100 * case.share(result):.0f} %")
        if copies:
            line.append(f"{100 * case.rate(result) / case.copy_bandwidth():.0f} %")
        line += ["–" if a is None else f"{a:.2f}" for a in ratios]
        line.append("?" if result.peak_extra is None else f"{round(result.peak_extra / 1e6, 1):g}")
        line += [f"{round(result.state_bytes / case.numel, 2):g}", f"{len(result.samples)}"]
        lines.append(line)
    return lines


def heading(case: Case) -> str:
    bandwidth = "bandwidth not measured"
    if case.probe_samples:
        bandwidth = f"read-modify-write bandwidth {case.bandwidth() / 1e9:.1f} GB/s"
    copy = case.copy_bandwidth()
    return (
        f"{case.title}, {str(case.dtype).removeprefix('torch.')}: {case.numel:,} parameters in "
        f"{len(case.shapes):,} tensor{'s' * (len(case.shapes) > 1)}; {bandwidth}"
        + (f"; copy {copy / 1e9:.1f} GB/s" if copy else "")
        + f"; other processes kept {case.others_busy:.1f} CPUs busy"
    )


def notes(case: Case) -> list[str]:
    found = []
    for result in case.results:
        if result.missing:
            found.append(f"{result.row.name}: not measured, {result.missing}")
        elif result.row.compiles:
            found.append(f"{result.row.name}: the first step, which compiles, took {result.first_step_s:.1f} s")
    return found


def table(case: Case, anchors: Mapping[str, str]) -> str:
    """The case as text, with the columns of `cells`."""
    lines = cells(case, anchors)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [heading(case)]
    for line in lines:
        padded = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        ]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text + [f"  {note}" for note in notes(case)])


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The first of the lines has the headings."""
    heads, *others = lines
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *others))


def markdown(case: Case, anchors: Mapping[str, str]) -> str:
    text = markdown_table(cells(case, anchors))
    return "\n".join([heading(case), "", text, *(f"\n{note}" for note in notes(case))])


def as_json(case: Case) -> dict[str, Any]:
    def by_round(samples: Mapping[int, float]) -> list[float | None]:
        """In milliseconds, in the order of the rounds; null is a round in which the row was not timed.
        Five digits: rounds differ in the second or third."""
        last = max(samples, default=-1)
        return [significant(1e3 * samples[i], 5) if i in samples else None for i in range(last + 1)]

    rows = []
    for result in case.results:
        row = result.row
        entry: dict[str, Any] = {"key": row.key, "name": row.name, "missing": result.missing}
        if result.samples and case.probe_samples:
            # Of the samples as they are kept, so that it can be told again.
            kept = {i: ms / 1e3 for i, ms in enumerate(by_round(result.samples)) if ms is not None}
            entry |= {
                "seconds_median": significant(quartiles(kept)[1]),
                "bytes_moved_per_parameter": row.moved(case.dtype),
                "peak_extra_bytes": result.peak_extra,
                "state_bytes": result.state_bytes,
                "first_step_s": significant(result.first_step_s),
                "samples_ms": by_round(result.samples),
            }
            for kind, samples in (("host", result.host_samples), ("idle", result.idle_samples)):
                if samples and samples != result.samples:  # as on a GPU
                    entry[f"{kind}_samples_ms"] = by_round(samples)
        rows.append(entry)
    return {
        "title": case.title,
        "dtype": str(case.dtype).removeprefix("torch."),
        "parameters": case.numel,
        "tensors": len(case.shapes),
        "rmw_bandwidth_bytes_per_s": significant(case.bandwidth()) if case.probe_samples else None,
        "probe_bytes": case.probe_bytes,
        "probe_samples_ms": by_round(case.probe_samples),
        "copy_bandwidth_bytes_per_s": significant(case.copy_bandwidth() or 0) if case.copy_samples else None,
        "copy_bytes": case.copy_bytes,
        "copy_samples_ms": by_round(case.copy_samples),
        "other_processes_busy_cpus": significant(case.others_busy),
        "rows": rows,
    }


def from_json(saved: Mapping[str, Any], rows: Mapping[str, Row], shapes: Sequence[tuple[int, ...]]) -> Case:
    """What `as_json` made of a case. `rows`: by key."""

    def by_round(samples: Sequence[float | None]) -> dict[int, float]:
        return {i: ms / 1e3 for i, ms in enumerate(samples) if ms is not None}

    results = []
    for entry in saved["rows"]:
        result = Result(rows[entry["key"]], entry["missing"])
        if "samples_ms" in entry:
            result.samples = by_round(entry["samples_ms"])
            result.host_samples = by_round(entry.get("host_samples_ms", entry["samples_ms"]))
            if "idle_samples_ms" in entry or "host_samples_ms" not in entry:
                result.idle_samples = by_round(entry.get("idle_samples_ms", entry["samples_ms"]))
            result.peak_extra, result.state_bytes = entry["peak_extra_bytes"], entry["state_bytes"]
            result.first_step_s = entry["first_step_s"]
        results.append(result)
    case = Case(saved["title"], list(shapes), getattr(torch, saved["dtype"]), saved["probe_bytes"], results)
    case.probe_samples = by_round(saved["probe_samples_ms"])
    case.copy_bytes, case.copy_samples = saved["copy_bytes"], by_round(saved["copy_samples_ms"])
    case.others_busy = saved["other_processes_busy_cpus"]
    return case
