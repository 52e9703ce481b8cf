"""`quantize_`: the linear layers of any model to packed ones, in place; `dequantize_`: back."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError
from ..nn.decoder import QuantDecoder
from ..nn.keep import HoldsPacked
from ..nn.linear import QuantLinear
from ..quant import PackedWeight
from ..quant.quantize import algorithm_of, check_algo, quantize_packed, relative_error
from .plan import (
    Choice,
    Overrides,
    Plan,
    Request,
    Scheme,
    Target,
    fitted,
    kind_of,
    plan,
)
from .progress import reporting
from .replace import Census, commit, dense_tensors, quantized_only, replacement
from .report import LayerReport, QuantReport, QuantWarning
from .source import Source, Weights, dense_values, opened

Progress = Callable[[int, int, str], Any] | bool | None


def quantize_(
    model: nn.Module,
    spec: Scheme = "W4A16",
    *,
    group_size: int | None = None,
    algo: str = "auto",
    modules_to_not_convert: Collection[str] = ("lm_head",),
    overrides: Overrides | None = None,
    embeddings: Scheme | None = None,
    act: str = "auto",
    weights: Weights | None = None,
    progress: Progress = None,
    device: torch.device | str | None = None,
) -> QuantReport:
    """Replaces the linear layers of `model` by packed ones, in place.

    nn.Linear and the Conv1D of transformers become `qk.nn.QuantLinear`. What is left as it is, and
    why, is in the report, which counts parameters; above 5% of them dense it also warns.

    spec: a scheme ("W4A16", "W8A8", "W6A16", "MXFP4", ...) or a QuantSpec.
    group_size: columns per scale, for a scheme. Where it does not divide a layer's columns, the
        largest multiple of 16 that does is taken instead, and reported.
    algo: "rtn" (to the nearest, with searched clips), "hqq" (half-quadratic), or "auto".
    modules_to_not_convert: names of modules that stay dense, with all below them: paths, or parts
        of paths ("lm_head", "layers.0", "mlp.gate"). A name that is nowhere is an error, but for
        "lm_head".
    overrides: {regular expression: scheme, QuantSpec, or None for dense}, searched in the path of
        every layer; the first that is found decides, also against modules_to_not_convert. One that
        matches nothing is an error.
    embeddings: a scheme or QuantSpec for nn.Embedding, which becomes `qk.nn.QuantEmbedding`. A head
        tied to such a table is quantized with it and shares its weight, unless an override names
        it.
    act: of the linear layers: "int8" quantizes activations at run time, "float" does not, "auto"
        does what the scheme says (A8 or A16); with a QuantSpec, it depends on the device.
    weights: for a model on the meta device: a mapping of its names to tensors, or a path of
        safetensors. Layers are read, quantized and freed one by one.
    progress: called with the weights done, their number, and the layer; None and True show a bar,
        on a terminal only; False nothing.
    device: where the model lives afterwards; None: where it is, and the CPU for weights on meta.

    All or nothing: when it raises, the model is as it was. Packed layers and the dense model are in
    memory together until the end, unless the model is on meta. Raises ValueError (values that are
    not finite, by their place; no such scheme, module or pattern), TypeError, CheckpointError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be an nn.Module, got {type(model).__name__}")
    check_algo(algo)
    request = Request.of(spec, group_size, modules_to_not_convert, overrides, embeddings, act)
    decided = plan(model, request)
    targets = [target for group in decided.targets for target in group]
    if any("" in target.names for target in targets):
        raise ValueError(
            f"quantize_: the model is itself a {type(model).__name__}, which cannot be replaced in "
            "place; use QuantLinear.from_linear"
        )
    where = None if device is None else torch.device(device)
    before = Census.of(model)
    layers: list[LayerReport] = []
    packed: list[PackedWeight] = []
    with opened(weights, model) as source, reporting(progress, "quantizing") as report:
        done, total = 0, sum(group[0].weight.numel() for group in decided.targets)
        for group in decided.targets:
            layer, weight = _quantize(group, algo, source, where)
            layers.append(layer)
            packed.append(weight)
            done += layer.n * layer.k
            report(done, total, layer.names[0])
        gone = quantized_only(model, targets)
        values = dense_values(model, source, where, gone)
    made: list[tuple[Target, HoldsPacked]] = []
    for group, weight in zip(decided.targets, packed, strict=True):
        modules = [replacement(target, weight, values) for target in group]
        for module in modules[1:]:
            module._share(modules[0])
        made += zip(group, modules, strict=True)
    commit(model, {id(target.module): module for target, module in made}, values)
    _tell_transformers(model, "adopt")
    result = _report(model, decided, layers, before)
    text = result.dense_warning()
    if text is not None:
        warnings.warn(text, QuantWarning, stacklevel=2)
    return result


def _quantize(
    group: list[Target], algo: str, source: Source | None, where: torch.device | None
) -> tuple[LayerReport, PackedWeight]:
    """The one weight of a group of tied modules."""
    target = group[0]
    n, k = target.shape
    weight, names = target.weight.detach(), [name for t in group for name in t.names]
    nbytes = weight.nbytes
    if weight.is_meta:
        if source is None:
            raise ValueError(
                f"quantize_: {target.name}.weight is on meta: it has no values; say with weights= "
                "where they are"
            )
        weight = source.get([f"{name}.weight" for name in names], weight.shape)
        if not weight.is_floating_point():
            raise CheckpointError(f"{source.where}: {target.name}.weight is {weight.dtype}")
        where = where or torch.device("cpu")
    if where is not None:
        weight = weight.to(where)
    if target.transposed:
        weight = weight.t()
    spec = target.choice.spec
    packed = quantize_packed(weight, spec, algo=algo, name=f"quantize_: {target.name}.weight")
    layer = LayerReport(
        names=tuple(names),
        kind=type(target.module).__name__,
        n=n,
        k=k,
        spec=str(spec),
        act="-" if all(t.kind == "embedding" for t in group) else _act(group),
        algo=algorithm_of(algo, spec),
        nbytes_before=nbytes,
        nbytes=packed.nbytes,
        error=relative_error(weight, packed),
        note=target.note,
    )
    return layer, packed


def _act(group: list[Target]) -> str:
    return next(t.choice.act for t in group if t.kind != "embedding")


def _report(
    model: nn.Module, decided: Plan, layers: list[LayerReport], before: Census
) -> QuantReport:
    after = Census.of(model)
    dense = dense_tensors(model)
    linear = [layer for layer in layers if layer.act != "-"]
    return QuantReport(
        layers=tuple(layers),
        skipped=tuple(decided.skipped),
        dense=tuple(dense),
        notes=tuple(decided.notes),
        params=before.params,
        params_quantized=before.params - sum(d.params for d in dense),
        nbytes_before=before.nbytes,
        nbytes=after.nbytes,
        linear_nbytes_before=sum(layer.nbytes_before for layer in linear),
        linear_nbytes=sum(layer.nbytes for layer in linear),
    )


def quantized_layer(
    linear: nn.Module, spec: Scheme, group_size: int | None, algo: str, act: str
) -> QuantLinear:
    """What `QuantLinear.from_linear` does."""
    kind = kind_of(linear)
    if kind not in ("linear", "conv1d"):
        raise TypeError(
            "QuantLinear.from_linear takes an nn.Linear or a Conv1D of transformers without a "
            f"forward of its own, got {type(linear).__name__}"
        )
    check_algo(algo)
    request = Request.of(spec, group_size, (), None, None, act)
    target = Target(linear, ("linear",), kind, request.linear)
    fitting, target.note = fitted(request.linear.spec, target.shape[1])
    target.choice = Choice(fitting, request.linear.act)
    _, packed = _quantize([target], algo, None, None)
    layer = replacement(target, packed, {})
    assert isinstance(layer, QuantLinear)
    return layer


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Undoes `quantize_`, in place: layers of the classes they were, on dequantized weights.

    dtype: of the weights; None: what the layers had, as `.half()` and the like have changed it
    since, and float32 for packed layers that never were others. Layers that were tied share one
    weight again. Returns the model. Raises TypeError, and ValueError for a model on meta or one
    that is itself a packed layer. A QuantDecoder is refused: its layers take only packed weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dequantize_: model must be an nn.Module, got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dequantize_: dtype must be a float type, got {dtype}")
    if isinstance(model, HoldsPacked):
        raise ValueError(
            f"dequantize_: the model is itself a {type(model).__name__}, which cannot be replaced "
            "in place; use its dequantize()"
        )
    if isinstance(model, QuantDecoder):
        raise TypeError("dequantize_: a QuantDecoder runs on packed weights only")
    weights: dict[Any, nn.Parameter] = {}
    new: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        if not isinstance(module, HoldsPacked):
            continue
        if module.weight.is_meta:
            raise ValueError(f"dequantize_: {path}.weight is on meta: it has no values")
        new[id(module)] = module._restored(dtype, weights)
    commit(model, new, {})
    _tell_transformers(model, "disown")
    return model


def _tell_transformers(model: nn.Module, what: str) -> None:
    """A model of transformers must know that its save_pretrained is to write packed layers, or no
    longer. Other models, and a transformers that `qkernels.hf` does not know, are left alone."""
    host = sys.modules.get("transformers.modeling_utils")
    if host is None or not isinstance(model, host.PreTrainedModel):
        return
    from ..hf.versions import HostVersionError, require

    with contextlib.suppress(HostVersionError):
        require("transformers")
        getattr(import_module("qkernels.hf.quantizer"), what)(model)
