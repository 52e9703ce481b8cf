"""`replace_decoder_layers_`: the decoder layers of a transformers model run by ours, cache and all;
`restore_decoder_layers_`: back.

Importing this module does not import transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...convert import quantize_
from ...loading import check_head_dim
from ...models import Family, ModelConfig, family_of_hf
from ...nn.arguments import asked_types, context_length
from ...nn.decoder import QuantDecoder
from ...nn.linear import QuantLinear
from ...nn.parts import angles
from ...quant import QuantSpec
from ..versions import require

_REPLACE = "replace_decoder_layers_"


def replace_decoder_layers_(
    model: nn.Module,
    spec: QuantSpec | str | None = None,
    *,
    act: str = "auto",
    kv_dtype: str | torch.dtype = "auto",
    max_seq_len: int | None = None,
    **quantize: Any,
) -> nn.Module:
    """Makes a transformers model run its decoder layers through our programs, in place.

    A forward then runs all layers as one native call (on the CPU, where all their matrices are
    packed; else op by op), with keys and values in pages of ours inside the host's `DynamicCache`.
    Everything else stays the host's: `generate`, embedding, last norm and head, the names in
    `state_dict`, hooks, `output_hidden_states`. Where a gradient is asked for, or where a layer has
    been changed inside (adapters, hooks), the host's own layers run on the same weights.

    model: Llama, Mistral, Qwen2, Qwen3 or Gemma 3 (text) of transformers, with a head or without,
        float or quantized.
    spec: a scheme or QuantSpec: `qk.quantize_(model, spec, ...)` is done first; None: the layers
        stay as they are, and a dense layer runs op by op.
    act: of the linear layers inside: "int8", "float", or "auto": what each of them says.
    kv_dtype: of keys and values: float32, float16, bfloat16, int8 or int4; "auto" is float16, on a
        GPU the type of the model.
    max_seq_len: tokens of the longest sequence, padding left out; None: what the model was made
        for, at most 32768.
    quantize: further arguments of `qk.quantize_`, such as embeddings="W8A8"; only with a spec.

    Returns the model. Raises TypeError for what is not such a model, UnsupportedModelError (a
    ValueError) for a family or an option without code here, ValueError for a model that is replaced
    already, is spread over devices, or rotates by other angles than the program would, and for
    arguments; HostVersionError for a transformers that is missing or unknown. Whatever it raises
    before it has quantized, the model is as it was.
    """
    require("transformers")
    asked = asked_types(act, "auto", kv_dtype)
    decoder = _decoder_of(model)
    if _is_replaced(decoder):
        raise ValueError(
            f"{_REPLACE}: the layers are replaced already; use restore_decoder_layers_ first"
        )
    family, config = _described(decoder)
    length = context_length(max_seq_len, config)
    _check_modules(decoder, family, config)
    _check_angles(decoder, config, length)
    if spec is not None:
        quantize_(model, spec, act=act, **quantize)
    elif quantize:
        raise TypeError(f"{_REPLACE}: {', '.join(quantize)} belong to quantize_, and need a spec")
    _install(model, decoder, family, config, asked, length)
    return model


def restore_decoder_layers_(model: nn.Module) -> nn.Module:
    """Undoes `replace_decoder_layers_`, in place: the host's own layers run again, on the weights
    as they are now (`qk.dequantize_` makes those float). Returns the model. Raises TypeError for
    what is not a transformers model, ValueError for one without replaced layers.
    """
    require("transformers")
    from .forward import DecoderForward

    decoder = _decoder_of(model, "restore_decoder_layers_")
    if not _is_replaced(decoder):
        raise ValueError("restore_decoder_layers_: the decoder layers are the host's own")
    stack: Any = decoder.layers
    for layer in stack:
        del layer.forward
    del decoder.rotary_emb.forward
    if isinstance(vars(decoder).get("forward"), DecoderForward):
        del decoder.forward
    for module, act in stack.acts:
        module.act = act
    decoder.layers = nn.ModuleList(list(stack))
    _host_model(model).set_attn_implementation(stack.host_attention)
    return model


# What the host's model is


def _decoder_of(model: Any, what: str = _REPLACE) -> Any:
    """The module of the host that holds `layers`."""
    from transformers import PreTrainedModel

    if isinstance(model, QuantDecoder):
        raise TypeError(f"{what}: a QuantDecoder runs these programs by itself")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: model must be an nn.Module, got {type(model).__name__}")
    get_decoder: Any = getattr(model, "get_decoder", None)
    found = None if get_decoder is None else get_decoder()
    if not isinstance(found, PreTrainedModel) or not isinstance(
        getattr(found, "layers", None), nn.ModuleList
    ):
        raise TypeError(
            f"{what}: expected a decoder-only language model of transformers, got "
            f"{type(model).__name__}"
        )
    return found


def _host_model(model: Any) -> Any:
    """The outermost model of transformers: that of PEFT wraps one."""
    from transformers import PreTrainedModel

    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def _is_replaced(decoder: Any) -> bool:
    from .stack import DecoderStack

    return isinstance(decoder.layers, DecoderStack)


def _described(decoder: Any) -> tuple[Family, ModelConfig]:
    raw = decoder.config.to_dict()
    where = f"{_REPLACE}: {type(decoder).__name__}"
    try:
        family = family_of_hf(raw.get("model_type", ""))
        config = family.from_hf({**raw, "dtype": str(decoder.dtype).removeprefix("torch.")})
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from error
    check_head_dim(config, where)
    if decoder.config.output_attentions:
        raise ValueError(f"{where}: config.output_attentions is set, which nobody computes here")
    if not getattr(decoder.config, "is_causal", True):
        raise ValueError(f"{where}: attention must be causal (config.is_causal is False)")
    return family, config


def _check_modules(decoder: Any, family: Family, config: ModelConfig) -> None:
    where = f"{_REPLACE}: {type(decoder).__name__}"
    home = type(decoder).__module__
    for module in (decoder, *decoder.layers):
        if type(module).__module__ != home or not home.startswith("transformers.models."):
            raise TypeError(
                f"{where}: expected the classes of transformers, whose forward is known, got "
                f"{type(module).__module__}.{type(module).__name__}"
            )
    if len(decoder.layers) != config.layers:
        raise ValueError(
            f"{where}: the configuration has {config.layers} layers, the model "
            f"{len(decoder.layers)}"
        )
    devices = {p.device for p in decoder.layers.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ValueError(
            f"{where}: all layers must be on one device, and have values, got "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    if not hasattr(decoder, "rotary_emb"):
        raise TypeError(f"{where}: expected a rotary embedding (rotary_emb)")
    for d in family.weights(config):
        if not d.name.startswith("layers."):
            continue
        path, _, part = d.hf.removeprefix("model.").rpartition(".")
        try:
            tensor = decoder.get_submodule(path)._parameters[part]
        except (AttributeError, KeyError):
            tensor = None
        if tensor is None:
            raise TypeError(f"{where}: expected a weight {path}.{part}")
        if type(tensor).__name__ == "DTensor" or hasattr(tensor, "placements"):
            raise ValueError(f"{where}: {path}.{part} is split over processes (tensor parallel)")


def _check_angles(decoder: Any, config: ModelConfig, length: int) -> None:
    """The host's rotation must be ours: a kind of scaling that we read differently would give wrong
    text without a word. A host that was cast (`.bfloat16()`) has rounded its frequencies; ours are
    those of its configuration, as when it is loaded in that type."""
    where = f"{_REPLACE}: {type(decoder).__name__} rotates by other angles than its configuration"
    fresh = type(decoder.rotary_emb)(decoder.config)
    held = dict(decoder.rotary_emb.named_buffers())
    for name, buffer in fresh.named_buffers():
        found = held.get(name)
        if found is None or not torch.equal(found.cpu(), buffer.to(found.dtype)):
            raise ValueError(f"{where} says: its {name} has been changed")
    # The host rounds frequencies to float32, which turns position p by up to p * 2^-24.
    positions = sorted({0, 1, 7, min(length, 4096) // 2, min(length, 4096) - 1} & {*range(length)})
    # The host has a rotation for each kind of layer that occurs, if they differ.
    kinds: dict[str, tuple[Any, ...]] = {"rope": ()}
    if config.local_rope is not None:
        named = {"rope": "full_attention", "rope.local": "sliding_attention"}
        used = set(decoder.config.layer_types)
        kinds = {name: (kind,) for name, kind in named.items() if kind in used}
    for name, kind in kinds.items():
        rope = config.ropes[name]
        cosines, sines = fresh(torch.zeros(1, 1, 1), torch.tensor([positions]), *kind)
        half = rope.dim // 2
        theirs = torch.cat((cosines[0, :, :half], sines[0, :, :half]), dim=1).float()
        ours = angles(rope, max(positions) + 1)[positions]
        allowed = torch.tensor(positions).unsqueeze(1) * 2.0**-22 + 1e-5
        if theirs.shape != ours.shape or not bool(((theirs - ours).abs() <= allowed).all()):
            raise ValueError(f"{where} means here ({name}: {rope})")


# Into the host


def _install(
    model: Any,
    decoder: Any,
    family: Family,
    config: ModelConfig,
    asked: dict[str, str],
    length: int,
) -> None:
    from .cache import CacheShape
    from .forward import DecoderForward
    from .mask import NAME, RotaryForward
    from .stack import DecoderStack, LayerForward

    device = next(decoder.layers.parameters()).device
    on_cpu = device.type == "cpu"
    half = "bfloat16" if not on_cpu and decoder.dtype == torch.bfloat16 else "float16"
    kv_dtype = half if asked["kv_dtype"] == "auto" else asked["kv_dtype"]
    shape = CacheShape(config.layers, config.kv_heads, config.head_dim, kv_dtype, length, device)
    layers = list(decoder.layers)
    for index, layer in enumerate(layers):
        if "forward" in vars(layer):
            raise ValueError(
                f"{_REPLACE}: layers.{index} has a forward of its own (of accelerate's hooks?)"
            )
    stack: Any = DecoderStack(layers, config, family, decoder.config, shape)
    stack.train(decoder.layers.training)
    stack.host_attention = decoder.config._attn_implementation
    stack.acts = []
    if asked["act"] != "auto":
        for module in stack.modules():
            if isinstance(module, QuantLinear):
                stack.acts.append((module, module.act))
                module.act = asked["act"]
    stack.plan(decoder.dtype)  # what cannot run is known now
    decoder.layers = stack
    for index, layer in enumerate(layers):
        layer.forward = LayerForward(stack, index)
    decoder.rotary_emb.forward = RotaryForward(decoder.rotary_emb)
    if "forward" not in vars(decoder):  # else it has one of accelerate's hooks
        decoder.forward = DecoderForward(decoder)
    _host_model(model).set_attn_implementation(NAME)
