"""What `QuantDecoder` is given: checked, with one clear error, and opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..loading import Checkpoint, Progress, load_gguf, load_hf_directory, load_hf_model
from ..models import ModelConfig
from ..ops.linear import ACTS
from ..quant import QuantSpec

# A context beyond this costs memory for positions few programs use; ask for it with max_seq_len.
DEFAULT_CONTEXT = 32768
KV_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
DTYPES = ("float32", "float16", "bfloat16")  # of activations

Prompt = str | Sequence[int] | torch.Tensor


def check_input_ids(input_ids: Any, logits_to_keep: Any) -> tuple[int, int, int]:
    """Batch, length, and how many of the last positions to keep. Raises as `forward` says."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (
        torch.int64,
        torch.int32,
    ):
        what = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 or int32 tensor, got {what}")
    check_values("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must have shape [B, T] with T > 0, got {list(input_ids.shape)}"
        )
    count, length = input_ids.shape
    if (
        isinstance(logits_to_keep, bool)
        or not isinstance(logits_to_keep, int)
        or logits_to_keep < 0
    ):
        raise ValueError(f"logits_to_keep must be a non-negative integer, got {logits_to_keep!r}")
    return count, length, min(logits_to_keep or length, length)


def check_values(name: str, ids: torch.Tensor) -> None:
    if ids.is_meta:
        raise ValueError(f"{name}: expected token ids on the CPU, got a tensor on meta")


def prompt_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, torch.Tensor):
        return [prompts] if prompts.dim() == 1 else list(prompts)
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts: expected a text, token ids or a list of them, got {type(prompts).__name__}"
        )
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got an empty list")
    return [prompts] if isinstance(prompts[0], int) else list(prompts)


def one_of(name: str, value: Any, known: Sequence[str], auto: str) -> str:
    if value == "auto":
        return auto
    if value not in known:
        raise ValueError(
            f"{name} must be auto, {' or '.join([', '.join(known[:-1]), known[-1]])}, got {value!r}"
        )
    return str(value)


def asked_types(act: Any, dtype: Any, kv_dtype: Any) -> dict[str, str]:
    """The types that were asked for, "auto" among them. Raises ValueError for others."""
    return {
        "act": one_of("act", act, ACTS, auto="auto"),
        "dtype": one_of("dtype", dtype_name(dtype), DTYPES, auto="auto"),
        "kv_dtype": one_of("kv_dtype", dtype_name(kv_dtype), KV_DTYPES, auto="auto"),
    }


def dtype_name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def context_length(max_seq_len: int | None, config: ModelConfig) -> int:
    if max_seq_len is None:
        return min(config.max_position, DEFAULT_CONTEXT)
    if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int) or max_seq_len < 1:
        raise ValueError(f"max_seq_len must be a positive integer, got {max_seq_len!r}")
    if max_seq_len > config.max_position:
        raise ValueError(
            f"max_seq_len {max_seq_len} exceeds the {config.max_position} positions of the model"
        )
    return max_seq_len


def spec_of(spec: Any) -> QuantSpec | None:
    if spec is None or isinstance(spec, QuantSpec):
        return spec
    if isinstance(spec, str):
        return QuantSpec.from_scheme(spec)
    raise TypeError(f"spec must be a QuantSpec, a scheme like 'W4A16', or None, got {spec!r}")


def load(
    path_or_model: Any,
    spec: QuantSpec | None,
    embeddings: QuantSpec | None,
    progress: Progress | None,
    device: torch.device | None = None,
) -> Checkpoint:
    if isinstance(path_or_model, nn.Module):
        if not hasattr(path_or_model, "config"):
            raise TypeError(
                f"expected a path or a transformers model, got a {type(path_or_model).__name__} "
                f"without config"
            )
        return load_hf_model(path_or_model, spec, embeddings, progress, device)
    if not isinstance(path_or_model, (str, Path)):
        raise TypeError(
            f"expected a path or a transformers model, got {type(path_or_model).__name__}"
        )
    path = checkpoint_path(path_or_model)
    if path.is_dir():
        return load_hf_directory(path, spec, embeddings, progress, device)
    refuse_specs(path, spec, embeddings)
    return load_gguf(path, progress, device)


def checkpoint_path(given: str | Path) -> Path:
    """The GGUF file or directory of safetensors that a path means. Raises FileNotFoundError, or
    ValueError for a directory with neither, or several."""
    path = Path(given).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "neither"
            raise ValueError(
                f"{path}: expected config.json or exactly one GGUF file, found {names}"
            )
        return found[0]
    return path


def refuse_specs(path: Path, spec: QuantSpec | None, embeddings: QuantSpec | None) -> None:
    """Raises ValueError for a spec of a GGUF file, which is quantized already."""
    if spec is not None or embeddings is not None:
        raise ValueError(
            f"{path}: spec and embeddings are for float checkpoints; a GGUF file is quantized "
            f"already"
        )
