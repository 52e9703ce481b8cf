"""What a decoder is in numbers, and the tools with which families read it from checkpoints.

A family (`models/llama.py`) turns the metadata of a checkpoint into a `ModelConfig`. Whatever a
checkpoint asks for and the family cannot do is refused by name: an option that is ignored gives
wrong text without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..nn.program import Step
from ..ops.rope import rope_table

# The deepest models have about 130 layers. A damaged number must not become lists of that length.
MAX_LAYERS = 4096
MAX_ROTARY = 1 << 16


class UnsupportedModelError(ValueError):
    """The checkpoint is sound, but this package has no code for something in it."""


def shown(value: Any) -> str:
    """repr(value) for messages, cut where a checkpoint says too much."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _number(value: Any, kind: type, what: str) -> Any:
    """value as int or float. Raises ValueError, beginning with `what`, for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} must be a number, got {shown(value)}")
    if kind is int and not (isinstance(value, int) or value.is_integer()):
        raise ValueError(f"{what} must be an integer, got {value!r}")
    if kind is int and not 0 <= value < 1 << 31:  # sizes and counts, which kernels take as int32
        raise ValueError(f"{what} must be from 0 to {(1 << 31) - 1}, got {shown(value)}")
    if not abs(value) < 1e300:  # infinity, NaN, and integers that no float holds
        raise ValueError(f"{what} must be finite, got {shown(value)}")
    return kind(value)


def _layers(count: int, what: str) -> int:
    if not 0 < count <= MAX_LAYERS:
        raise ValueError(f"{what} must be from 1 to {MAX_LAYERS} layers, got {count}")
    return count


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the first `dim` columns of each head.

    scaling: empty for none, else {"rope_type": name, ...} with the parameters of transformers'
    configurations. factors: [dim / 2] divisors of the inverse frequencies as some GGUF files carry
    them, or None.
    """

    dim: int
    theta: float = 10000.0
    scaling: Mapping[str, Any] = field(default_factory=dict)
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.dim <= MAX_ROTARY or self.dim % 2:
            raise ValueError(
                f"rope: the rotary dimension must be even and from 2 to {MAX_ROTARY}, got "
                f"{self.dim} (of head_dim)"
            )
        if not 1 < self.theta < float("inf"):
            raise ValueError(f"rope: theta must be above 1 and finite, got {self.theta}")
        if self.factors is not None and len(self.factors) != self.dim // 2:
            raise ValueError(
                f"rope: expected {self.dim // 2} frequency factors, got {len(self.factors)}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder. One value serves every checkpoint format."""

    family: str  # as the checkpoint calls it, for messages: "llama", "qwen3", ...
    vocab: int
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    rope: RopeConfig
    max_position: int  # longest sequence the model was made for, in tokens
    windows: tuple[int, ...]  # per layer: positions a query sees, itself included; 0: all
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and k, before rotation
    activation: str = "silu"  # silu, gelu_tanh, gelu_erf, relu
    tied: bool = False  # logits use the embedding table
    embed_scale: float = 1.0  # rows of the table are multiplied by it
    attention_scale: float | None = None  # of q . k; None: head_dim ** -0.5
    local_rope: RopeConfig | None = None  # of layers with a window, where it differs from `rope`

    def __post_init__(self) -> None:
        for name in (
            "vocab",
            "hidden",
            "layers",
            "q_heads",
            "kv_heads",
            "head_dim",
            "ffn",
            "max_position",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{self.family}: {name} must be a positive integer, got {value!r}")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"{self.family}: {self.q_heads} query heads cannot share {self.kv_heads} key-value "
                f"heads evenly"
            )
        if self.rope.dim > self.head_dim:
            raise ValueError(
                f"{self.family}: rotary dimension {self.rope.dim} exceeds head_dim {self.head_dim}"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"{self.family}: norm_eps must be positive, got {self.norm_eps}")
        if len(self.windows) != self.layers or any(window < 0 for window in self.windows):
            raise ValueError(
                f"{self.family}: expected {self.layers} non-negative windows (sliding_window), got "
                f"{shown(self.windows)}"
            )
        for name in ("embed_scale", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{self.family}: {name} must be positive, got {value}")
        if self.local_rope is not None and self.local_rope.dim > self.head_dim:
            raise ValueError(
                f"{self.family}: rotary dimension {self.local_rope.dim} exceeds head_dim "
                f"{self.head_dim}"
            )

    @property
    def ropes(self) -> dict[str, RopeConfig]:
        """The tables of rotary angles, by the names that `KvAppend` steps give them."""
        tables = {"rope": self.rope}
        return tables if self.local_rope is None else {**tables, "rope.local": self.local_rope}


@dataclass(frozen=True)
class WeightDef:
    """One weight of a model: its name in the program, its shape, and its names in checkpoints.

    Matrices are [N, K] (out, in); the table of embeddings is [vocab, hidden]; vectors [N].
    rotary_heads: GGUF files of this family store the rows of that many heads with the pairs of the
    rotation side by side; 0: in natural order. Other formats never do. hf_offset: to be added to a
    vector of transformers' checkpoints; in GGUF files it has been added.
    """

    name: str
    shape: tuple[int, ...]
    gguf: str
    hf: str
    rotary_heads: int = 0
    hf_offset: float = 0.0

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class Family:
    """Everything the package knows about models of one architecture family.

    hf_types, gguf_types: the names by which config.json ("model_type") and GGUF
    ("general.architecture") call it. from_hf(raw config.json), from_gguf(metadata, shapes of the
    tensors by name, read(name) -> values of a vector). weights: every weight the program names.
    ignored: patterns of checkpoint tensors that hold nothing of their own.
    """

    name: str
    hf_types: tuple[str, ...]
    gguf_types: tuple[str, ...]
    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    from_gguf: Callable[
        [Mapping[str, Any], Mapping[str, tuple[int, ...]], Callable[[str], Iterable[float]]],
        ModelConfig,
    ]
    weights: Callable[[ModelConfig], tuple[WeightDef, ...]]
    program: Callable[[ModelConfig], tuple[Step, ...]]
    ignored: tuple[str, ...] = ()


# Keys of config.json that change the result in ways no family here knows, with the values that mean
# "off".
_REFUSED_IN_HF: dict[str, tuple[Any, ...]] = {
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "no_rope_layers": (),
    "kv_lora_rank": (),
    "q_lora_rank": (),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "use_qk_norm": (False,),
    "layer_norm_eps": (),
}


def refuse_unknown_hf_options(
    raw: Mapping[str, Any],
    extra: Mapping[str, tuple[Any, ...]],
    known: Iterable[str] = (),
) -> None:
    """Raises UnsupportedModelError for keys that matter and that the family does not read.

    extra: further keys with the values that mean "off", as in the table above. None always means
    off. known: keys of the table that this family does read.
    """
    for key, off in {**_REFUSED_IN_HF, **extra}.items():
        value = raw.get(key)
        if value is None or value in off or key in known:
            continue
        raise UnsupportedModelError(
            f"config.json of model_type {raw.get('model_type')!r}: {key} = {shown(value)} is "
            f"not supported"
        )


def hf_number(raw: Mapping[str, Any], key: str, kind: type = int, default: Any = None) -> Any:
    """raw[key] as a number of `kind`; a missing or null key gives `default`, or ValueError if that
    is None.
    """
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"config.json of model_type {raw.get('model_type')!r} lacks {key!r}")
        return default
    return _number(value, kind, f"config.json: {key}")


def hf_layers(raw: Mapping[str, Any]) -> int:
    """The number of layers, checked before anything is made once per layer."""
    key = "num_hidden_layers"
    return _layers(hf_number(raw, key), f"config.json: {key}")


def hf_flag(raw: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """raw[key] as a bool; a missing key gives `default`, null False."""
    value = raw.get(key, default)
    if value not in (None, False, True):
        raise ValueError(f"config.json: {key} must be true or false, got {shown(value)}")
    return bool(value)


def hf_mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """raw[key], an object; {} without it."""
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json: {key} must be an object, got {shown(value)}")
    return dict(value or {})


# transformers' names of activations -> those of the op `gate`
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def hf_activation(raw: Mapping[str, Any], key: str, default: str) -> str:
    """The activation under `key` of config.json, by its name here."""
    activation = raw.get(key, default)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: {key} = {shown(activation)} is not supported; supported are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[activation]


def hf_windows(kinds: Any, layers: int, window: int) -> tuple[int, ...]:
    """Positions seen per layer, 0 for all. kinds: `layer_types` of config.json; window: its
    `sliding_window`, 0 if that is off.
    """
    if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"config.json: layer_types must be a list of names, got {shown(kinds)}")
    if len(kinds) != layers:
        raise ValueError(f"config.json: layer_types must name {layers} layers, got {len(kinds)}")
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(f"config.json: layer_types {shown(unknown)} are not supported")
    if "sliding_attention" in kinds and not window:
        raise ValueError(
            "config.json: layer_types asks for sliding_attention, but sliding_window is off"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


# Parameters that each kind of scaled rotation needs and may have.
ROPE_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def make_rope(
    dim: int,
    theta: float,
    kind: str,
    parameters: Mapping[str, Any],
    where: str,
    factors: tuple[float, ...] | None = None,
) -> RopeConfig:
    """Checks the kind of scaling and its parameters. where: the beginning of error messages."""
    if not isinstance(kind, str):
        raise ValueError(f"{where}: rope_type must be a name, got {shown(kind)}")
    if kind in ("default", "none"):
        return RopeConfig(dim, theta, {}, factors)
    if kind not in ROPE_PARAMETERS:
        supported = ", ".join(["default", *ROPE_PARAMETERS])
        raise UnsupportedModelError(
            f"{where}: rope type {shown(kind)} is not supported; supported are {supported}"
        )
    if factors is not None:
        raise UnsupportedModelError(
            f"{where}: rope type {kind!r} together with frequency factors is not supported"
        )
    needed, optional = ROPE_PARAMETERS[kind]
    missing = [key for key in needed if parameters.get(key) is None]
    if missing:
        raise ValueError(f"{where}: rope type {kind!r} lacks {', '.join(missing)}")
    unknown = [
        key for key in parameters if key not in needed + optional and parameters[key] is not None
    ]
    if unknown:
        raise UnsupportedModelError(
            f"{where}: rope type {kind!r} does not know {', '.join(unknown)[:120]}"
        )
    kept = {key: parameters[key] for key in needed + optional if parameters.get(key) is not None}
    for key, value in kept.items():
        if key == "truncate" and isinstance(value, bool):
            continue
        if not _number(value, float, f"{where}: rope parameter {key}") > 0:
            raise ValueError(
                f"{where}: rope parameter {key} must be a positive number, got {value!r}"
            )
    rope = RopeConfig(dim, theta, {"rope_type": kind, **kept}, factors)
    try:  # what the table refuses, it must refuse before minutes of loading
        table = rope_table(dim, 2, theta, rope.scaling)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: rope type {kind!r}: {error}") from error
    if not table.isfinite().all():
        raise ValueError(f"{where}: rope type {kind!r}: {shown(kept)} gives infinite angles")
    return rope


def rope_from_hf(raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Rotation of a config.json: `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling` (before).
    """
    where = f"config.json of model_type {raw.get('model_type')!r}"
    parameters = hf_mapping(raw, "rope_parameters") or hf_mapping(raw, "rope_scaling")
    by_layer = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if by_layer:
        raise UnsupportedModelError(
            f"{where}: rotations that differ by layer are not supported: {shown(by_layer)}"
        )
    legacy_kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or legacy_kind or "default"
    inner = {key: parameters.pop(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    theta = hf_number(inner, "rope_theta", float, hf_number(raw, "rope_theta", float, 10000.0))
    partial = hf_number(
        inner, "partial_rotary_factor", float, hf_number(raw, "partial_rotary_factor", float, 1.0)
    )
    if not 0 < partial <= 1:
        raise ValueError(
            f"config.json: partial_rotary_factor must be above 0 and at most 1, got {partial}"
        )
    if kind == "yarn" and parameters.get("original_max_position_embeddings") is None:
        parameters["original_max_position_embeddings"] = hf_number(raw, "max_position_embeddings")
    return make_rope(int(head_dim * partial), theta, kind, parameters, where)


class GgufKeys:
    """Metadata `<architecture>.*` of a GGUF file, read key by key; keys nobody asked for are
    refused at the end.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.architecture = str(metadata["general.architecture"])
        prefix = f"{self.architecture}."
        self._values = {
            key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)
        }
        self._read: set[str] = set()

    def number(self, key: str, kind: type = int, default: Any = None) -> Any:
        """The number under `key`; without it `default`, or ValueError if that is None."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"GGUF metadata lacks {self.architecture}.{key}")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnsupportedModelError(
                f"GGUF metadata: {self.architecture}.{key} must be one number for all layers, got "
                f"{shown(value)}"
            )
        return _number(value, kind, f"GGUF metadata: {self.architecture}.{key}")

    def layers(self) -> int:
        """The number of layers, checked before anything is made once per layer."""
        key = "block_count"
        return _layers(self.number(key), f"GGUF metadata: {self.architecture}.{key}")

    def text(self, key: str, default: str) -> str:
        self._read.add(key)
        return str(self._values.get(key, default))

    def number_or_flags(self, key: str, default: int) -> int | list[bool]:
        """The integer under `key`, or the list of booleans there, one per layer."""
        value = self._values.get(key)
        if value is None or isinstance(value, (bool, int, float)):
            return self.number(key, int, default)
        self._read.add(key)
        flags = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(flags, list) or any(flag not in (0, 1) for flag in flags):
            raise UnsupportedModelError(
                f"GGUF metadata: {self.architecture}.{key} must be a number or a boolean per "
                f"layer, got {shown(value)}"
            )
        return [bool(flag) for flag in flags]

    def expect(self, key: str, *off: Any) -> None:
        """Raises unless `key` is missing or has one of the values `off`, with which it changes
        nothing.
        """
        self._read.add(key)
        value = self._values.get(key)
        scalar = isinstance(value, (bool, int, float, str))  # else an array, which no `off` is
        if value is not None and not (scalar and value in off):
            raise UnsupportedModelError(
                f"GGUF metadata: {self.architecture}.{key} = {shown(value)} is not supported"
            )

    def refuse_the_rest(self) -> None:
        rest = sorted(set(self._values) - self._read)
        if rest:
            named = ", ".join(
                f"{shown(f'{self.architecture}.{key}')[1:-1]} = {shown(self._values[key])}"
                for key in rest[:8]
            )
            raise UnsupportedModelError(
                f"GGUF metadata of an unknown kind of {self.architecture} model: {named}"
            )


def rope_from_gguf(keys: GgufKeys, head_dim: int, factors: tuple[float, ...] | None) -> RopeConfig:
    """Rotation of a GGUF file. factors: the values of its tensor `rope_freqs.weight`, if it has
    one.
    """
    where = f"GGUF metadata of {keys.architecture!r}"
    kind = keys.text("rope.scaling.type", "default")
    factor = keys.number("rope.scaling.factor", float, 0.0)
    # Files made before `rope.scaling.*` say the same with one number.
    legacy = keys.number("rope.scale_linear", float, 0.0)
    if kind == "default" and legacy not in (0.0, 1.0):
        kind, factor = "linear", legacy
    keys.text("rope.scaling.finetuned", "")  # says how the model was made
    original = keys.number("rope.scaling.original_context_length", int, 0)
    keys.expect("rope.scaling.attn_factor", 0.0, 1.0)
    parameters: dict[str, Any] = {"factor": factor} if factor else {}
    if kind == "yarn" and original:
        parameters["original_max_position_embeddings"] = original
    dim = keys.number("rope.dimension_count", int, head_dim)
    theta = keys.number("rope.freq_base", float, 10000.0)
    return make_rope(dim, theta, kind, parameters, where, factors)
