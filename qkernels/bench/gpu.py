"""Kernels on a GPU: chains of launches in a CUDA graph, in turns with a read of the same bytes.

A launch of some 10 us cannot be timed by itself: the host would be measured, or a cache. So a
sample is a chain of at least 64 launches that go through copies of their inputs, captured once,
between two events. The ceiling of a case is `peak_read` over as many bytes, chained in the same way
and sampled in turns with the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import triton
from ..backends import select
from ..cache import KV_DTYPES, token_bytes
from ..ops.linear import default_act_group
from ..quant.spec import QuantSpec
from ..quant.weight import PackedWeight
from ..reference import gate as reference_gate
from ..reference import linear as reference_linear
from ..reference import norm as reference_norm
from . import attention
from .cases import AttentionCase, Case, LinearCase, NormCase
from .check import U32, magnitude, require_close, unit
from .inputs import Baseline, Problem, Rotation, turns
from .linear import _checked
from .shapes import MODELS

LEAST_LAUNCHES = 64
# The L2 of an H200 has 50 MB; a chain goes through at least four times as much.
ROTATION = Rotation(cache=110 << 20, limit=24 << 30)
READ = "peak_read"
OURS_IN_TRITON = "qkernels_triton"
BFLOAT16, INT4, SDPA, RMS_NORM = "cublas_bfloat16", "torch_int4pack", "torch_sdpa", "torch_rms_norm"


class Chain(Protocol):
    """Launches that are timed together."""

    def sample(self) -> float:
        """Microseconds per launch."""
        ...


class GraphChain:
    """call(0), call(1), ... as one CUDA graph."""

    def __init__(self, call: Callable[[int], Any], launches: int) -> None:
        self._launches = launches
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)  # allocates workspaces, and compiles where there is something to compile
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for i in range(launches):
                call(i)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> float:
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return 1e3 * self._start.elapsed_time(self._end) / self._launches


class LoopChain:
    """The calls one after the other: for tests without a GPU."""

    def __init__(self, call: Callable[[int], Any], launches: int) -> None:
        self._call, self._launches = call, launches
        call(0)

    def sample(self) -> float:
        start = time.perf_counter()
        for i in range(self._launches):
            self._call(i)
        return 1e6 * (time.perf_counter() - start) / self._launches


@dataclass(frozen=True)
class Place:
    """Where cases run. read: a call that reads its bytes. launches: at least so many in a chain."""

    device: torch.device
    chain: Callable[[Callable[[int], Any], int], Chain]
    read: Callable[[Tensor], Any]
    rotation: Rotation = ROTATION
    launches: int = LEAST_LAUNCHES
    dtype: torch.dtype = torch.bfloat16

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        made = torch.randn(shape, generator=generator, device=self.device)
        return made.to(dtype or self.dtype)

    def codes(self, *shape: int) -> Tensor:
        """uint8, all values."""
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=self.device)


def cuda_place() -> Place:
    device = torch.device("cuda", torch.cuda.current_device())
    return Place(device, GraphChain, torch.ops.qkernels.peak_read.default)


# Peers beyond torch's: (case, its weight, x [m, k], copies of the weight's bytes) -> a baseline.
Peer = Callable[[LinearCase, PackedWeight, Tensor, int], Baseline]


def random_weight(spec: QuantSpec, n: int, k: int, place: Place) -> PackedWeight:
    """Random codes and scales, made on the device: every byte is a code."""
    weight = PackedWeight.empty(spec, n, k, device=place.device)
    generator = torch.Generator(place.device).manual_seed(3)

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            shape = tensor.shape
            values = torch.rand(shape, generator=generator, device=place.device)
            tensor.copy_((values * (high - low) + low).to(tensor.dtype))

    weight.codes.copy_(place.codes(*weight.codes.shape).view(torch.int8))
    if spec.two_level:
        fill(weight.scale, 64, 127)
        fill(weight.zero, 1, 127)
        fill(weight.block_scale, 1e-4, 2e-4)
        fill(weight.block_zero, 1e-3, 2e-3)
    else:
        fill(weight.scale, 0.005, 0.01)
        fill(weight.zero, *((0.02, 0.08) if spec.zero == "minimum" else (0, 2**spec.bits)))
    return weight


def clones(weight: PackedWeight, count: int) -> list[PackedWeight]:
    made = [weight]
    for _ in range(count - 1):
        tensors = {name: tensor.clone() for name, tensor in weight.tensors().items()}
        made.append(PackedWeight(weight.spec, weight.n, weight.k, **tensors))
    return made


def build(case: Case, place: Place, peers: Mapping[str, Peer] | None = None) -> Problem:
    """The inputs, calls and checks of a case on the device."""
    if isinstance(case, LinearCase):
        return _linear(case, place, peers or {})
    if isinstance(case, AttentionCase):
        return _attention(case, place)
    if isinstance(case, NormCase):
        return _norm(case, place)
    assert isinstance(case, GateCase)
    return _gate(case, place)


def _linear(case: LinearCase, place: Place, peers: Mapping[str, Peer]) -> Problem:
    weight = random_weight(case.spec, case.n, case.k, place)
    count = place.rotation.copies(weight.nbytes)
    x = place.floats(case.m, case.k)
    act_group = default_act_group(weight) if case.act == "int8" else 0
    op = select(
        "linear", x.device, weight=weight.kind, act=case.act, group=weight.group,
        act_group=act_group,
    )  # fmt: skip
    args = [(x, *copy.op_args(), None, case.act, act_group) for copy in clones(weight, count)]
    problem = Problem(
        turns(args, op),
        lambda: _check_linear(case, op(*args[-1]), x, weight, act_group),
        nbytes=case.nbytes,
        ops=2.0 * case.m * case.n * case.k,
        peak=case.act,
        rotated=count * weight.nbytes,
    )
    theirs: dict[str, Callable[[], Baseline]] = {BFLOAT16: lambda: _cublas(case, x, place)}
    if case.spec.bits == 4 and x.is_cuda:
        theirs[INT4] = lambda: _int4pack(case, x, place)
    if has_triton(x):

        def check(what: str, y: Tensor) -> None:
            _check_linear(case, y, x, weight, act_group)

        theirs[OURS_IN_TRITON] = lambda: _in_triton("linear", args, check)
    for name, peer in peers.items():
        theirs[name] = lambda peer=peer: peer(case, weight, x, count)  # type: ignore[misc]
    for name, make in theirs.items():
        add_peer(problem, name, make)
    return problem


def add_peer(problem: Problem, name: str, make: Callable[[], Baseline]) -> None:
    """Makes a baseline; one that cannot run here, for whatever reason, is noted with it."""
    try:
        problem.add_baseline(name, make)
    except Exception as error:
        problem.left_out[name] = f"{type(error).__name__}: {str(error)[:200]}"


def _check_linear(
    case: LinearCase, y: Tensor, x: Tensor, weight: PackedWeight, act_group: int
) -> None:
    """As on the CPU, and what 16-bit types add: y is rounded, and where many rows are multiplied
    the weights may have been."""
    rows, blocks = _checked(case)
    part = x[rows].float()
    for start, stop in blocks:
        cut = weight.slice_rows(start, stop)
        want = reference_linear(part, *cut.op_args(), None, case.act, act_group)
        size = magnitude(cut.unpack())
        terms = (part.square() @ size.square().T).sqrt()
        bound = 2 * (4 * case.k**0.5 + 8) * U32 * (part.abs() @ size.T)
        bound += unit(y.dtype) * (2 * want.abs() + 4 * terms)
        if case.act == "int8":  # a value at a tie may get the next code
            bound += terms / 127
        require_close(f"{case.name}, rows {start} to {stop}", y[rows, start:stop], want, bound)


def has_triton(x: Tensor) -> bool:
    """Whether Triton's kernels run where x is; interpreted ones are not worth measuring."""
    return x.is_cuda and triton.problem() is None


def _in_triton(
    op: str, args: list[tuple[Any, ...]], check: Callable[[str, Tensor], None]
) -> Baseline:
    """The Triton row of an op on the same arguments; ours is whichever row is chosen."""
    return Baseline(turns(args, getattr(torch.ops.qkernels_triton, op)), check)


def _cublas(case: LinearCase, x: Tensor, place: Place) -> Baseline:
    count = place.rotation.copies(2 * case.n * case.k)
    copies = [place.floats(case.n, case.k) for _ in range(count)]

    def check(what: str, y: Tensor) -> None:
        rows = _checked(case)[0]
        want = x[rows].float() @ copies[0][:64].float().T
        norm = x[rows].float().norm(dim=1)[:, None] * copies[0][:64].float().norm(dim=1)
        bound = unit(y.dtype) * 2 * want.abs() + 8 * U32 * case.k**0.5 * norm
        require_close(what, y[rows, :64], want, bound)

    return Baseline(turns([(x, w) for w in copies], F.linear), check)


def _int4pack(case: LinearCase, x: Tensor, place: Place) -> Baseline:
    """torch's own 4-bit product; w = scale (q - 8) + offset, scales [K / group, N, 2] bfloat16."""
    group = case.spec.group(case.k)
    codes = place.codes(case.n, case.k // 2)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.zeros(case.k // group, case.n, 2, dtype=torch.bfloat16, device=x.device)
    scales[..., 0] = 0.01
    count = place.rotation.copies(packed.nbytes)
    copies = [packed.clone() for _ in range(count)]

    def check(what: str, y: Tensor) -> None:
        q = torch.stack((codes[:64] >> 4, codes[:64] & 15), dim=2).flatten(1).float() - 8
        want = 0.01 * (x[:4].float() @ q.T)
        bound = 0.02 * (x[:4].float().norm(dim=1)[:, None] * q.norm(dim=1) * 0.01)
        require_close(what, y[:4, :64], want, bound)

    product = torch.ops.aten._weight_int4pack_mm
    return Baseline(turns([(x.bfloat16(), w, group, scales) for w in copies], product), check)


def _attention(case: AttentionCase, place: Place) -> Problem:
    model, kind = MODELS[case.model], KV_DTYPES[case.kv_dtype]
    heads, dim, page = model.kv_heads, model.head_dim, attention.PAGE
    pages = -(-case.context // page)
    per_token = token_bytes(case.kv_dtype, heads, dim)
    count = place.rotation.copies(pages * page * per_token)
    shape = (count * pages, heads, page, dim * kind.bits // 8 if kind.scaled else dim)
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if kind.scaled:
        k_pages, v_pages = place.codes(*shape), place.codes(*shape).roll(1, 0)
        planes = torch.empty(count * pages, heads, 2, page, device=place.device).half()
        planes[:, :, 0] = 4.0 / 2**kind.bits
        planes[:, :, 1] = 2 ** (kind.bits - 1)
        scales = planes, planes.clone()
    else:
        k_pages = place.floats(*shape, dtype=kind.torch_dtype)
        v_pages = k_pages.roll(1, 0)
    q = place.floats(case.m, model.q_heads, dim)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": place.device}
    start, length = torch.tensor([0, case.m], **ints), torch.tensor([case.context], **ints)
    tables = torch.arange(count * pages, **ints).view(count, 1, pages)
    scale = dim**-0.5
    op = select("attention", q.device)
    args = [
        (q, start, length, table, k_pages, v_pages, *scales, scale, True, 0, 0.0)
        for table in tables
    ]

    def check(what: str, out: Tensor, table: Tensor) -> None:
        k = attention.read_pages(k_pages, scales[0], table, case.context, dim)
        v = attention.read_pages(v_pages, scales[1], table, case.context, dim)
        wide = 2.0 if kind.scaled else 1.0
        # Queries, probabilities and results are rounded to 16 bits.
        extra = unit(place.dtype) * float(v.abs().max()) * wide
        for token, want, bound in attention._expected(q.float(), k, v, wide):
            bound = bound + 2 * unit(out.dtype) * want.abs() + extra
            require_close(f"{what}, token {token}", out[token], want, bound)

    pairs = case.m * (case.context - case.m) + case.m * (case.m + 1) // 2
    problem = Problem(
        turns(args, op),
        lambda: check(case.name, op(*args[-1]), tables[-1, 0]),
        nbytes=per_token * case.context,
        ops=4.0 * pairs * model.q_heads * dim,
        peak="float",
        rotated=count * pages * page * per_token,
    )
    add_peer(problem, SDPA, lambda: _sdpa(case, q, place))
    if has_triton(q):

        def check_first(what: str, out: Tensor) -> None:
            check(what, out, tables[0, 0])

        add_peer(problem, OURS_IN_TRITON, lambda: _in_triton("attention", args, check_first))
    return problem


def _sdpa(case: AttentionCase, q: Tensor, place: Place) -> Baseline:
    model = MODELS[case.model]
    nbytes = 4 * case.context * model.kv_heads * model.head_dim
    keys = [
        place.floats(2, 1, model.kv_heads, case.context, model.head_dim)
        for _ in range(place.rotation.copies(nbytes))
    ]
    query = q.transpose(0, 1)[None].contiguous()
    causal = case.m == case.context

    def call(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, k, v, is_causal=causal, enable_gqa=True)

    def check(what: str, out: Tensor) -> None:
        one, (k, v) = q.float(), keys[0][:, 0].transpose(1, 2).float()
        extra = 2 * unit(out.dtype) * float(v.abs().max())
        for token, want, bound in attention._expected(one, k, v, 1.0):
            require_close(f"{what}, token {token}", out[0, :, token], want, bound + extra)

    return Baseline(turns([tuple(kv.unbind()) for kv in keys], call), check)


def _norm(case: NormCase, place: Place) -> Problem:
    size = case.m * case.k * place.dtype.itemsize
    count = place.rotation.copies(size)
    rows = [place.floats(case.m, case.k) for _ in range(count)]
    weight = place.floats(case.k, dtype=torch.float32) + 1
    op, eps = select("norm", place.device), 1e-6

    def check(what: str, y: Tensor) -> None:
        want = reference_norm(rows[0][:4].float(), weight, None, eps, False)
        bound = (2 * unit(y.dtype) + 2 * (case.k + 8) * U32) * want.abs()
        require_close(what, y[:4], want, bound)

    args = [(x, weight, None, eps, False) for x in rows]
    problem = Problem(
        turns(args, op),
        lambda: check(case.name, op(rows[0], weight, None, eps, False)),
        nbytes=2.0 * size,  # read and written
        ops=4.0 * case.m * case.k,
        peak="float",
        rotated=count * size,
    )
    low = weight.to(place.dtype)

    def theirs(x: Tensor) -> Tensor:
        return F.rms_norm(x, [case.k], low, eps)

    problem.baselines[RMS_NORM] = Baseline(turns([(x,) for x in rows], theirs), lambda *_: None)
    if has_triton(rows[0]):
        add_peer(problem, OURS_IN_TRITON, lambda: _in_triton("norm", args, check))
    return problem


@dataclass(frozen=True)
class GateCase(Case):
    """silu(gate) * up of [m, k] each."""

    k: int

    @property
    def kernel(self) -> str:
        return "gate"

    @property
    def detail(self) -> str:
        return f"[{self.m}, {self.k}] M={self.m}"

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "k": self.k, "act": "float"}


def _gate(case: GateCase, place: Place) -> Problem:
    size = case.m * case.k * place.dtype.itemsize
    rows = [place.floats(2, case.m, case.k) for _ in range(place.rotation.copies(2 * size))]
    op = select("gate", place.device)

    def check() -> None:
        gate, up = rows[0]
        want = reference_gate(gate[:4].float(), up[:4].float(), "silu")
        bound = 2 * unit(place.dtype) * want.abs() + 2.0**-20 * up[:4].float().abs()
        require_close(case.name, op(gate, up, "silu")[:4], want, bound)

    return Problem(
        turns([(gate, up, "silu") for gate, up in rows], op),
        check,
        nbytes=3.0 * size,
        ops=5.0 * case.m * case.k,
        peak="float",
        rotated=2 * len(rows) * size,
    )


@dataclass
class Reads:
    """Chains of reads by the bytes of one launch, made once."""

    place: Place
    _chains: dict[int, Chain] = field(default_factory=dict)

    def of(self, nbytes: float) -> Chain:
        """A chain of which each launch reads so many bytes, of other memory than the one before."""
        size = max(16, int(nbytes) // 16 * 16)
        if size not in self._chains:
            count = self.place.rotation.copies(size)
            memory = self.place.codes(count, size)
            call = turns([(part,) for part in memory.unbind()], self.place.read)
            self._chains[size] = self.place.chain(call, launches(self.place, count))
        return self._chains[size]


def launches(place: Place, copies: int) -> int:
    """Whole turns through the copies."""
    return -(-place.launches // copies) * copies
