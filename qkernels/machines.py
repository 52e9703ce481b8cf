"""What a machine can do, for a plan: measured in a second where it is this one, from a data sheet
where it is named."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

GB = 10**9


@dataclass(frozen=True)
class Machine:
    """Where a model is to run.

    kind: "cpu" or "cuda". memory: bytes that a process may take there. process: bytes of those that
    it has taken before a model is loaded. read: bytes of memory per second that all its cores read.
    int8_ops, float_ops: multiplications and additions per second, None where nothing measured them.
    source: where the numbers are from. here: whether it is this machine as it is, so that a model's
    own steps can be timed on it.
    """

    name: str
    kind: str
    memory: int
    process: int
    read: float
    int8_ops: float | None
    float_ops: float | None
    source: str
    here: bool = False


class Gpu(NamedTuple):
    """Of a data sheet: memory in GB and reads in GB/s, decimal units."""

    memory: float
    read: float
    sheet: str


# The vendors' data sheets, by the names that people call them.
GPUS = {
    "A100-40GB": Gpu(40, 1555, "NVIDIA A100 data sheet (PCIe and SXM, 40 GB)"),
    "A100-80GB": Gpu(80, 2039, "NVIDIA A100 data sheet (SXM, 80 GB)"),
    "H100": Gpu(80, 3350, "NVIDIA H100 data sheet (SXM)"),
    "H100-PCIe": Gpu(80, 2000, "NVIDIA H100 data sheet (PCIe)"),
    "H200": Gpu(141, 4800, "NVIDIA H200 data sheet"),
    "B200": Gpu(180, 7700, "NVIDIA DGX B200 data sheet, one of eight"),
    "L4": Gpu(24, 300, "NVIDIA L4 data sheet"),
    "L40S": Gpu(48, 864, "NVIDIA L40S data sheet"),
    "A10": Gpu(24, 600, "NVIDIA A10 data sheet"),
    "RTX-3090": Gpu(24, 936, "NVIDIA Ampere GA102 whitepaper"),
    "RTX-4090": Gpu(24, 1008, "NVIDIA Ada whitepaper"),
    "RTX-5090": Gpu(32, 1792, "NVIDIA RTX Blackwell whitepaper"),
    "MI300X": Gpu(192, 5300, "AMD Instinct MI300X data sheet"),
}
# A CUDA context, the kernels and the libraries of torch on the device. Not measured here: what
# users of torch report for such GPUs is 0.3 to 0.6 GB.
CUDA_PROCESS = GB // 2


def resident(pid: int | str = "self") -> int:
    """Bytes that a process has in memory now; 0 where the system does not say."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmRSS")


def _kilobytes(path: Path, name: str) -> int:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _limit(path: Path) -> int | None:
    """The number in a file of a control group; None without one, or for "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def available(root: Path = Path("/")) -> int:
    """Bytes that this process may have in all: what it has and what is free, at most the limit of
    its control group. Raises OSError where the system does not say."""
    free = _kilobytes(root / "proc/meminfo", "MemAvailable")
    if not free:
        raise OSError("this system does not say how much memory is available: give --memory")
    groups = root / "sys/fs/cgroup"
    limits = [_limit(groups / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    return min([free + resident(), *(limit for limit in limits if limit is not None)])


def read_rate(seconds: float = 0.5, array: Any = None) -> float:
    """Bytes per second that torch's threads read from memory: the median over passes, of which
    there are at least 5. Not the best: a machine that others share gives its memory in bursts,
    which decoding does not keep. array: an int64 tensor larger than the caches, made if None."""
    from .bench.ceilings import array_bytes
    from .bench.machine import best_read

    if array is None:
        import torch

        array = torch.ones(array_bytes() // 8, dtype=torch.int64)
    start, rates = time.perf_counter(), [best_read(array, repeats=1)]
    while len(rates) < 5 or time.perf_counter() - start < seconds:
        rates.append(best_read(array, repeats=1))
    return GB * median(rates)


def this_cpu(
    *, read: float | None = None, memory: int | None = None, measured: bool = True
) -> Machine:
    """This machine's CPU, with torch's threads. To be called before a model is loaded: what the
    process has taken counts as that of any process.

    read, memory: bytes per second and bytes to take instead of measuring. measured: whether to
    measure operations per second, too. Raises OSError where the system tells no memory.
    """
    import torch

    from .bench.ceilings import peak
    from .bench.machine import cpu_name

    process = resident()
    rates = {
        kind: max(peak(kind) for _ in range(3)) * GB if measured else None
        for kind in ("int8", "float32")
    }
    threads = torch.get_num_threads()
    return Machine(
        name=f"{cpu_name()}, {threads} threads, {torch.ops.qkernels.cpu_isa()}",
        kind="cpu",
        memory=available() if memory is None else memory,
        process=process,
        read=read_rate() if read is None else read,
        int8_ops=rates["int8"],
        float_ops=rates["float32"],
        source="measured now" if read is None else "bandwidth as given",
        here=read is None,
    )


def named_gpu(name: str, *, read: float | None = None, memory: int | None = None) -> Machine | None:
    """A GPU of the table, whatever the case of its name; None for another name."""
    key = {known.casefold(): known for known in GPUS}.get(name.replace(" ", "-").casefold())
    if key is None:
        return None
    gpu = GPUS[key]
    return Machine(
        name=key,
        kind="cuda",
        memory=int(gpu.memory * GB) if memory is None else memory,
        process=CUDA_PROCESS,
        read=gpu.read * GB if read is None else read,
        int8_ops=None,
        float_ops=None,
        source=gpu.sheet,
    )


def present_gpu(device: str, *, read: float | None = None, memory: int | None = None) -> Machine:
    """A GPU of this machine, as torch describes it. Raises ValueError or RuntimeError where there
    is none that can be used, with the reason."""
    import torch

    from . import devices

    where = devices.resolve(device)
    about = torch.cuda.get_device_properties(where)
    free, _ = torch.cuda.mem_get_info(where)
    told = read
    if told is None:  # two transfers per clock, over the width of the bus
        clock, bus = (getattr(about, n, 0) for n in ("memory_clock_rate", "memory_bus_width"))
        told = 2 * clock * 1000 * bus / 8
        if not told:
            raise ValueError(f"torch does not tell the bandwidth of {about.name}: give --bandwidth")
    return Machine(
        name=about.name,
        kind="cuda",
        memory=free + CUDA_PROCESS if memory is None else memory,
        process=CUDA_PROCESS,
        read=told,
        int8_ops=None,
        float_ops=None,
        source="as torch describes it",
    )


def machine_of(device: str, *, read: float | None = None, memory: int | None = None) -> Machine:
    """The machine that `device` names: cpu, cuda, cuda:1, auto, or a GPU of the table such as
    H200. Raises ValueError for another, with the names there are."""
    found = named_gpu(device, read=read, memory=memory)
    if found is not None:
        return found
    if device == "auto":
        from . import devices

        device = str(devices.resolve("auto"))
    if device == "cpu":
        return this_cpu(read=read, memory=memory)
    if re.fullmatch(r"cuda(:\d+)?", device):
        return present_gpu(device, read=read, memory=memory)
    raise ValueError(
        f"device {device!r}: expected cpu, cuda, cuda:1, auto, or one of {', '.join(GPUS)}"
    )
