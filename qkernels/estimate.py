"""The bytes and seconds of a model that is not loaded: its weights are on the meta device.

Bytes are those of the loader's own types, so that weights are exact. Seconds are bytes and
operations over what the machine gives, times the shares of it that recorded runs reached, unless
the model was rehearsed on it (`rehearse.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .cache import token_bytes
from .generate import PREFILL_CHUNK
from .loading import BLOCK_BYTES, Checkpoint, Weight, rows_per_block
from .machines import Machine
from .nn.arguments import context_length
from .nn.decoder import QuantDecoder
from .nn.program import (
    Attention,
    Embed,
    Gate,
    KvAppend,
    Linear,
    Norm,
    Permute,
    Quantize,
    Select,
    Step,
    lower,
)
from .nn.steps import PAGE
from .ops.linear import default_act_group, resolve_act
from .quant import PackedWeight
from .rehearse import Rehearsal

# Shares of what the machine gives that the CPU kernels reach, and times beside them, from
# bench/results: see docs/planning.md.
READ_SHARE = 0.85  # of the read bandwidth, packed weights of one token
KV_SHARE = {"float32": 0.6, "float16": 0.6, "bfloat16": 0.6, "int8": 0.5, "int4": 0.35}
DENSE_SHARE = 0.6  # of the read bandwidth, float matrices through torch
FLOAT_STEP_SHARE = 0.12  # of float32 operations, packed weights and float activations of one token
FEW_SHARE = 0.26  # of int8 operations, what each further sequence of a decode step costs
PREFILL_SHARE = {"int8": 0.6, "float": 0.9}  # of int8 and of float32 operations
ATTENTION_SHARE = 0.65  # of float32 operations, in prefill
LAYER_SECONDS = 10e-6  # barriers and small steps of a layer, of a decode step
OP_SECONDS = 15e-6  # a torch op, where a model runs one op after the other
ELEMENT_OPS = 1170  # float32 operations' worth of norms, gates and copies per element and token
FEWEST_PROMPT = 32  # tokens that tell how fast a prompt is read
# Predicted, never measured: docs/cuda-kernels.md; and a kernel of a captured graph, assumed.
GPU_READ_SHARE, GPU_STEP_SECONDS = 0.86, 2e-6
# A packed model is loaded with at most two unpacked blocks beside it; quantizing a block takes its
# float32 values and the candidates of the search.
LOADING_BLOCKS, QUANTIZING_BLOCKS = 2, 8
# Of a tokenizer while it is made, per entry of the vocabulary of a GGUF file: byte-level BPE has
# its merges there, in SentencePiece's kind they follow from the scores, several per token. A
# tokenizer.json takes so many times its size.
TOKENIZER_BYTES = {"gpt2": 700, "llama": 1720}
TOKENIZER_JSON = 15
HEAP_BYTES = 10 << 20  # what the allocator keeps, threads' stacks, first use of libraries


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for. process: before loading; weights: exact; tables: rotations;
    kv: pages of all sequences at the full context; workspace: registers of a step and logits;
    text: the tokenizer; heap: what allocators keep. loading: beside process and weights, while the
    model is loaded."""

    process: int
    weights: int
    tables: int
    kv: int
    workspace: int
    text: int
    heap: int
    loading: int

    @property
    def running(self) -> int:
        """Once the context is full."""
        return sum(asdict(self).values()) - self.loading

    @property
    def while_loading(self) -> int:
        return self.process + self.weights + self.heap + self.loading

    @property
    def peak(self) -> int:
        return max(self.running, self.while_loading)


def register_shapes(
    steps: Sequence[Step], weights: Mapping[str, Weight]
) -> dict[str, tuple[int, int]]:
    """The registers of a lowered program: name -> (width, columns per scale; 0: floats)."""
    shapes: dict[str, tuple[int, int]] = {}
    for step in steps:
        group = 0
        match step:
            case Embed():
                width = _shape(weights[step.weight])[1]
            case Linear():
                width = _shape(weights[step.weight])[0]
            case KvAppend() | Attention():
                width = shapes[step.q][0]
            case Gate():
                width, group = shapes[step.gate][0], step.act_group
            case Norm():
                width, group = shapes[step.src][0], step.act_group
            case Select():
                width = shapes[step.src][0]
            case Permute():
                width = shapes[step.src][0]
            case Quantize():
                width, group = shapes[step.src][0], step.act_group
            case _:
                raise TypeError(f"a whole model has no step {type(step).__name__}")
        shapes[step.dst] = width, group
    return shapes


def _shape(weight: Weight) -> tuple[int, int]:
    if isinstance(weight, PackedWeight):
        return weight.n, weight.k
    return weight.shape[0], weight.shape[-1]


def elements(weight: Weight) -> int:
    """Parameters of a weight, packed or dense."""
    return weight.n * weight.k if isinstance(weight, PackedWeight) else weight.numel()


class Estimate:
    """A checkpoint on meta, with what its program does."""

    def __init__(
        self, checkpoint: Checkpoint, machine: Machine, act: str, dtype: str, kv_dtype: str,
        context: int | None, quantizes: bool,
    ) -> None:  # fmt: skip
        self.checkpoint, self.machine, self.quantizes = checkpoint, machine, quantizes
        self.config = checkpoint.config
        self.context = context_length(context, self.config)
        self.decoder = QuantDecoder(checkpoint, act=act, dtype=dtype, max_seq_len=self.context)
        device = torch.device(machine.kind)
        on_gpu = machine.kind == "cuda"
        self.act = resolve_act(act, device)
        if dtype == "auto":
            half = checkpoint.raw_config.get("dtype") == "float16"
            dtype = ("float16" if half else "bfloat16") if on_gpu else "float32"
        self.dtype = dtype
        self.rehearsal: Rehearsal | None = None
        self.kv_dtype = kv_dtype
        if kv_dtype == "auto":
            self.kv_dtype = "bfloat16" if dtype == "bfloat16" else "float16"
        self.float_bytes = 4 if dtype == "float32" else 2
        # Without the order of columns, which meta does not tell: it would add a register or two.
        self.weights: dict[str, Weight] = {
            name: replace(w, perm=None) if isinstance(w, PackedWeight) else w
            for name, w in self.decoder.weights().items()
        }
        self.steps = lower(checkpoint.family.program(self.config), self._act_group)

    def _act_group(self, name: str) -> int:
        weight = self.weights[name]
        packed = isinstance(weight, PackedWeight) and self.act == "int8"
        return default_act_group(weight) if packed else 0  # type: ignore[arg-type]

    def with_kv(self, kv_dtype: str) -> Estimate:
        """The same with another type of keys and values."""
        other = copy.copy(self)
        other.kv_dtype = kv_dtype
        return other

    @property
    def quantized(self) -> bool:
        """Whether any matrix is packed."""
        return any(isinstance(w, PackedWeight) for w in self.weights.values())

    @property
    def kv_token(self) -> int:
        config = self.config
        return config.layers * token_bytes(self.kv_dtype, config.kv_heads, config.head_dim)

    def registers(self, tokens: int, rows: int) -> int:
        """Bytes of the registers of a step of `tokens` tokens, `rows` of whose logits are wanted,
        and of these."""
        selected = {step.dst for step in self.steps if isinstance(step, Select)}
        *_, logits = shapes = register_shapes(self.steps, self.weights)
        total = rows * self.config.vocab * 4
        for name, (width, group) in shapes.items():
            count = rows if name.split(":")[0] in selected else tokens
            if name == logits:
                continue
            if group:  # codes, float32 scales, int16 sums of 16 columns
                padded = -(-width // group) * group
                total += count * (padded + padded // group * 4 + padded // 16 * 2)
            else:
                total += count * width * self.float_bytes
        return total

    def memory(self, context: int, batch: int) -> Memory:
        config, blocks = self.config, 0
        for d in self.checkpoint.family.weights(config):
            weight = self.weights[d.name]
            if isinstance(weight, PackedWeight):
                k = weight.k
                rows = min(rows_per_block(4 * k if self.quantizes else k), weight.n)
                blocks = max(blocks, rows * k + rows * k // weight.group * 4)
        factor = QUANTIZING_BLOCKS if self.quantizes else LOADING_BLOCKS
        pages = batch * -(-context // PAGE)
        tables = sum(4 * context * rope.dim for rope in config.ropes.values())
        return Memory(
            process=self.machine.process,
            weights=self.decoder.nbytes,
            tables=tables,
            kv=pages * PAGE * self.kv_token,
            workspace=self.registers(min(PREFILL_CHUNK, batch * context), batch),
            text=self.text_bytes() if self.on_cpu else 0,
            heap=HEAP_BYTES if self.on_cpu else 0,
            loading=min(factor * blocks, factor * 2 * BLOCK_BYTES) if self.on_cpu else 0,
        )

    @property
    def on_cpu(self) -> bool:
        return self.machine.kind == "cpu"

    def text_bytes(self) -> int:
        """Of the tokenizer, the most while it is made; 0 without one."""
        gguf, path = self.checkpoint.gguf, Path(self.checkpoint.source) / "tokenizer.json"
        if gguf is not None:
            kind = gguf.metadata.get("tokenizer.ggml.model")
            entries = gguf.metadata.get("tokenizer.ggml.tokens", ())
            return TOKENIZER_BYTES.get(str(kind), 0) * len(entries)
        return TOKENIZER_JSON * path.stat().st_size if path.is_file() else 0

    def longest(self, batch: int) -> int:
        """The longest context that fits, 0 if none."""
        low, high = 0, self.config.max_position
        while low < high:
            middle = (low + high + 1) // 2
            if self.memory(middle, batch).peak <= self.machine.memory:
                low = middle
            else:
                high = middle - 1
        return low

    # Time

    def operations(self) -> tuple[int, int]:
        """Multiplications and additions of a token in matrices, without and with the logits."""
        linears = [s.weight for s in self.steps if isinstance(s, Linear)]
        *layers, head = (2 * elements(self.weights[name]) for name in linears)
        return sum(layers), sum(layers) + head

    def read_bytes(self) -> tuple[int, int]:
        """Bytes of weights that a decode step reads: packed, and dense."""
        used = {s.weight for s in self.steps if isinstance(s, Linear)}
        dense = sum(t.nbytes for n in used if isinstance(t := self.weights[n], torch.Tensor))
        return self.decoder.weight_bytes - dense, dense

    def kv_read(self, context: int) -> int:
        """Bytes of keys and values that a step of one sequence reads."""
        config = self.config
        tokens = sum(min(context, window) if window else context for window in config.windows)
        return token_bytes(self.kv_dtype, config.kv_heads, config.head_dim) * tokens

    def step_seconds(self, context: int, batch: int) -> float:
        """Of a decode step with so many tokens in each of `batch` sequences."""
        machine, rehearsal = self.machine, self.rehearsal
        if rehearsal is not None and rehearsal.batch == batch:
            return rehearsal.step + rehearsal.kv_byte * batch * self.kv_read(context)
        packed, dense = self.read_bytes()
        kv = batch * self.kv_read(context)
        if not self.on_cpu:
            read = (packed + dense + kv) / (GPU_READ_SHARE * machine.read)
            return read + len(self.steps) * GPU_STEP_SECONDS
        _, operations = self.operations()
        seconds = packed / (READ_SHARE * machine.read) + dense / (DENSE_SHARE * machine.read)
        if self.act == "float" and machine.float_ops and packed:
            seconds = max(seconds, operations / (FLOAT_STEP_SHARE * machine.float_ops))
        seconds += kv / (KV_SHARE[self.kv_dtype] * machine.read)
        seconds += self.config.layers * LAYER_SECONDS
        if dense:
            seconds += len(self.steps) * OP_SECONDS
        further = machine.int8_ops if self.act == "int8" else machine.float_ops
        share = FEW_SHARE if self.act == "int8" else PREFILL_SHARE["float"]
        if batch > 1 and further:
            seconds += (batch - 1) * operations / (share * further)
        return seconds

    def prompt_seconds(self, tokens: int) -> float | None:
        """Of a prompt of one sequence; None where nothing was measured that would tell."""
        rehearsal, computed = self.rehearsal, self._prompt_seconds(tokens)
        if rehearsal is None:
            return computed
        tried = self._prompt_seconds(rehearsal.prompt)
        if computed is None or tried is None:
            return rehearsal.prefill * tokens / rehearsal.prompt
        return rehearsal.prefill * computed / tried

    def rehearsed_prompt(self, tokens: int, seconds: float) -> int:
        """How much of a prompt of so many tokens may be tried in about that time."""
        whole = self._prompt_seconds(tokens)
        if whole is None:
            return min(tokens, FEWEST_PROMPT)
        if whole <= seconds:
            return tokens
        return min(tokens, max(FEWEST_PROMPT, int(tokens * seconds / whole)))

    def _prompt_seconds(self, tokens: int) -> float | None:
        machine, config = self.machine, self.config
        ops = machine.int8_ops if self.act == "int8" else machine.float_ops
        if not ops or not machine.float_ops:
            return None
        layers, whole = self.operations()
        seen = sum(min(tokens / 2, w) if w else tokens / 2 for w in config.windows)
        attention = 4 * config.q_heads * config.head_dim * seen
        seconds = tokens * layers / (PREFILL_SHARE[self.act] * ops)
        seconds += (whole - layers) / (PREFILL_SHARE[self.act] * ops)
        seconds += tokens * attention / (ATTENTION_SHARE * machine.float_ops)
        wide = config.layers * (config.hidden + config.ffn)
        return seconds + tokens * wide * ELEMENT_OPS / machine.float_ops
