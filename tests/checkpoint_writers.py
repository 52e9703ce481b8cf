"""Quantized transformers checkpoints, written by the formulas of their formats and by nothing of
the package under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Matrix:
    """codes [N, K] from 0, scale [N, G], zero [N, G] in codes, group_of [K], bits."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor
    bits: int

    @property
    def dense(self) -> Tensor:
        of = self.group_of
        return self.scale.float()[:, of] * (self.codes.float() - self.zero.float()[:, of])


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group: int = -1,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Matrix:
    """The plainest quantizer: from the least to the largest value of each group."""
    n, k = weight.shape
    group = k if group == -1 else group
    group_of = torch.arange(k) // group
    if act_order:
        group_of = group_of[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    groups, top, half = int(group_of.max()) + 1, 2**bits - 1, 2 ** (bits - 1)
    scale = torch.empty(n, groups, dtype=scale_dtype)
    zero = torch.full((n, groups), half)
    codes = torch.empty(n, k, dtype=torch.int64)
    for g in range(groups):
        part = weight.float()[:, group_of == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        width = 2 * torch.maximum(-low, high) if symmetric else high - low
        scale[:, g] = (width / top).clamp(min=1e-6)
        step = scale[:, g].float()
        if not symmetric:
            zero[:, g] = (-low / step).round().clamp(0, top)
        codes[:, group_of == g] = (
            ((part / step[:, None]).round() + zero[:, g, None]).clamp(0, top).long()
        )
    return Matrix(codes, scale, zero, group_of, bits)


def quantize_linears(model: nn.Module, make: Callable[[str, Tensor], Matrix | None]) -> Any:
    """Gives the linear layers (not the head) of a model quantized values, and returns them."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            matrix = make(path, module.weight.detach())
            if matrix is not None:
                found[path] = matrix
                module.weight.data = matrix.dense.to(module.weight.dtype)
    return found


def stream(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as int32 words: one stream of bits per row, lowest first."""
    rows, count = codes.shape
    each = (codes.numpy().astype(np.uint8)[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    flat = each.reshape(rows, count * bits)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little").view("<i4").copy())


def nibbles(codes: Tensor) -> Tensor:
    """AWQ: nibble j of word i holds column 8 i + AWQ_ORDER[j]."""
    eights = codes.reshape(codes.shape[0], -1, 8)[:, :, list(AWQ_ORDER)].numpy().astype(np.uint32)
    packed = np.zeros(eights.shape[:2], np.uint32)
    for j in range(8):
        packed |= eights[:, :, j] << np.uint32(4 * j)
    return torch.from_numpy(packed.view(np.int32))


def gptq_tensors(m: Matrix, v2: bool = False, g_idx: bool = True) -> dict[str, Tensor]:
    zero = m.zero if v2 else (m.zero - 1) % 2**m.bits
    tensors = {
        "qweight": stream(m.codes, m.bits).T,
        "qzeros": stream(zero.T, m.bits),
        "scales": m.scale.T,
    }
    if g_idx:
        tensors["g_idx"] = m.group_of.int()
    return tensors


def awq_tensors(m: Matrix, zeros: bool = True) -> dict[str, Tensor]:
    tensors = {"qweight": nibbles(m.codes.T), "scales": m.scale.T}
    return {**tensors, "qzeros": nibbles(m.zero.T)} if zeros else tensors


def packed_tensors(m: Matrix, symmetric: bool = True, act_order: bool = False) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized."""
    tensors = {
        "weight_packed": stream(m.codes, m.bits),
        "weight_scale": m.scale,
        "weight_shape": torch.tensor(m.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = stream(m.zero.T, m.bits).T
    if act_order:
        tensors["weight_g_idx"] = m.group_of.int()
    return tensors


def plain_tensors(m: Matrix, symmetric: bool = True) -> dict[str, Tensor]:
    """compressed-tensors' int-quantized and naive-quantized."""
    half = 2 ** (m.bits - 1)
    tensors = {"weight": (m.codes - half).to(torch.int8), "weight_scale": m.scale}
    if not symmetric:
        tensors["weight_zero_point"] = (m.zero - half).to(torch.int8)
    return tensors


def write(
    directory: Path,
    model: Any,
    tensors: dict[str, dict[str, Tensor]],
    quantization_config: dict[str, Any] | None,
    **changes: Tensor | None,
) -> Path:
    """config.json and model.safetensors: `tensors` by path of the matrix, the rest of the model as
    it is. changes: further tensors, or None for those that are left out."""
    directory.mkdir(exist_ok=True)
    config = model.config.to_dict()
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(config, default=str))
    state: dict[str, Tensor | None] = dict(_dense(model, tensors))
    for path, parts in tensors.items():
        state |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
    kept = {name: t.contiguous() for name, t in {**state, **changes}.items() if t is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _dense(model: Any, tensors: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if name.removesuffix(".weight") not in tensors and not tied:
            yield name, tensor.detach().clone()


def group_config(m_bits: int, **weights: Any) -> dict[str, Any]:
    """A config group of compressed-tensors for all linear layers."""
    return {
        "targets": ["Linear"],
        "weights": {"num_bits": m_bits, "type": "int", "symmetric": True, **weights},
        "input_activations": None,
        "output_activations": None,
    }


def ct_config(format: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        **more,
    }
