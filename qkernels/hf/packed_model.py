"""A causal language model of transformers whose matrices are the packed weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError
from ..convert.plan import Choice, Target, kind_of
from ..convert.replace import commit, replacement
from ..loading import Checkpoint, Progress
from ..nn.arguments import load, spec_of
from ..nn.keep import HoldsPacked
from ..quant import PackedWeight, QuantSpec
from ..text import text_of
from .configs import host_config
from .versions import require


def packed_model(
    path: str | Path,
    spec: QuantSpec | str | None = None,
    *,
    act: str = "auto",
    embeddings: QuantSpec | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of transformers from a checkpoint, its packed weights as `QuantDecoder`
    reads them: exactly those of the file.

    path: a GGUF file, or a directory with config.json and safetensors (float, GPTQ, AWQ,
    compressed-tensors, bitsandbytes). spec, embeddings: as in `QuantDecoder.from_pretrained`, for a
    float checkpoint. act: of the linear layers. dtype: of what is not packed, and of activations.
    The model is in evaluation mode on the CPU; nothing is downloaded.

    Raises as `QuantDecoder.from_pretrained` does; UnsupportedModelError (a ValueError) also for a
    GGUF file whose options transformers' configuration cannot say, HostVersionError for a
    transformers that is missing or unknown.
    """
    require("transformers")
    checkpoint = load(path, spec_of(spec), spec_of(embeddings), progress)
    text = text_of(checkpoint)
    try:
        tokenizer = text.transformers
    except LookupError:
        raise CheckpointError(f"{checkpoint.source} comes without a tokenizer") from None
    config = _config_of(checkpoint)
    if checkpoint.gguf is not None:
        config.bos_token_id, config.eos_token_id = text.bos_id, list(text.eos_ids) or None
        config.pad_token_id = tokenizer.pad_token_id
    model = _empty(config, dtype)
    _fill(model, checkpoint, act, dtype)
    _set_generation(model, checkpoint, text)
    model.name_or_path = checkpoint.source
    return model.eval(), tokenizer


def _config_of(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    if checkpoint.gguf is not None:
        return host_config(checkpoint.family, checkpoint.config)
    raw = {k: v for k, v in checkpoint.raw_config.items() if k != "quantization_config"}
    return AutoConfig.for_model(raw.pop("model_type"), **raw)


def _empty(config: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on meta, but its buffers (rotations) computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # on meta every module got a parameter of its own
    return model


def _fill(model: Any, checkpoint: Checkpoint, act: str, dtype: torch.dtype) -> None:
    """Puts the weights into the modules of their names."""
    new: dict[int, nn.Module] = {}
    values: dict[int, torch.Tensor] = {}
    modules: dict[str, nn.Module] = {}
    for d in checkpoint.family.weights(checkpoint.config):
        path, _, part = d.hf.rpartition(".")
        modules[path] = model.get_submodule(path)
        parameter = modules[path]._parameters[part]
        assert parameter is not None
        if tuple(parameter.shape) != tuple(d.shape):
            raise CheckpointError(
                f"{checkpoint.source}: {d.hf} is {list(d.shape)}, transformers' model has "
                f"{list(parameter.shape)}"
            )
        weight = checkpoint.weights[d.name]
        if isinstance(weight, torch.Tensor):
            values[id(parameter)] = (weight - d.hf_offset if d.hf_offset else weight).to(dtype)
    packed: dict[int, HoldsPacked] = {}
    for d in checkpoint.family.weights(checkpoint.config):
        weight = checkpoint.weights[d.name]
        if isinstance(weight, PackedWeight):
            module = modules[d.hf.rpartition(".")[0]]
            packed[id(module.weight)] = new[id(module)] = _packed(module, d.hf, weight, act, values)
    for path, module in model.named_modules():  # a head that is tied to a packed table
        kind = kind_of(module)
        if kind is None or id(module) in new or id(module.weight) not in packed:
            continue
        held = packed[id(module.weight)]
        new[id(module)] = tied = _packed(module, path, held.packed, act, values)
        tied._share(held)
    commit(model, new, values)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise CheckpointError(f"{checkpoint.source}: nothing for {', '.join(missing[:4])}")


def _packed(
    module: nn.Module, name: str, weight: PackedWeight, act: str, values: dict[int, torch.Tensor]
) -> HoldsPacked:
    kind = kind_of(module)
    if kind is None:
        raise CheckpointError(f"{name}: a {type(module).__name__} takes no packed weight")
    target = Target(module, (name,), kind, Choice(weight.spec, act))
    return replacement(target, weight, values)


def _set_generation(model: Any, checkpoint: Checkpoint, text: Any) -> None:
    """What ends an answer, and the defaults of sampling, of generation_config.json."""
    from transformers import GenerationConfig

    if checkpoint.generation:
        model.generation_config = GenerationConfig.from_dict(dict(checkpoint.generation))
    config = model.generation_config
    if config.eos_token_id is None:
        config.eos_token_id = list(text.eos_ids) or None
    if config.pad_token_id is None and config.eos_token_id is not None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
