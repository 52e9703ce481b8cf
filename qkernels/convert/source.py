"""Where the values of a model on the meta device come from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError
from ..loading import SafetensorsDirectory

Weights = Mapping[str, torch.Tensor] | str | Path


class Source:
    """Float tensors by the names of a model's state dict, read one at a time."""

    def __init__(self, tensors: Any, names: Collection[str], where: str, prefix: str) -> None:
        """tensors: gives a tensor for a name. prefix: of the model's base, which checkpoints of
        transformers may have or lack."""
        self._tensors, self._names, self.where, self._prefix = tensors, names, where, prefix

    def get(self, names: Collection[str], shape: torch.Size) -> torch.Tensor:
        """The tensor that stands under one of the names of a (tied) parameter.

        Raises CheckpointError where there is none, or one of another shape."""
        for name in names:
            for known in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")):
                if known not in self._names:
                    continue
                tensor = self._tensors(known)
                if not isinstance(tensor, torch.Tensor):
                    raise TypeError(
                        f"{self.where}: {known} must be a tensor, got {type(tensor).__name__}"
                    )
                if tensor.is_meta:
                    raise CheckpointError(f"{self.where}: {known} is on meta: it has no values")
                if tensor.shape != shape:
                    raise CheckpointError(
                        f"{self.where}: {known} must be {list(shape)}, got {list(tensor.shape)}"
                    )
                return tensor
        raise CheckpointError(f"{self.where}: missing {' or '.join(names)}")


@contextmanager
def opened(weights: Weights | None, model: nn.Module) -> Iterator[Source | None]:
    """The source of `quantize_`'s weights=: a mapping, a directory of safetensors, or one file."""
    prefix = getattr(model, "base_model_prefix", "") or "model"
    if weights is None:
        yield None
        return
    if isinstance(weights, Mapping):
        yield Source(weights.__getitem__, weights.keys(), "weights", prefix)
        return
    if not isinstance(weights, str | Path):
        raise TypeError(
            "quantize_: weights must be a mapping of names to tensors, or a path, got "
            f"{type(weights).__name__}"
        )
    path = Path(weights)
    with ExitStack() as stack:
        if path.is_dir():
            directory = SafetensorsDirectory(path, stack)
            yield Source(directory.whole, directory.shapes.keys(), str(path), prefix)
            return
        from safetensors import SafetensorError, safe_open

        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
        yield Source(file.get_tensor, set(file.keys()), str(path), prefix)


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter or persistent buffer -> its names in the state dict."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors: dict[str, Any] = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                names.setdefault(id(tensor), []).append(f"{path}.{name}".lstrip("."))
    return names


def dense_values(
    model: nn.Module, source: Source | None, device: torch.device | None, gone: set[int]
) -> dict[int, torch.Tensor]:
    """The values of whatever is on meta, or not on `device`, but for the parameters in `gone`:
    id of a parameter or buffer -> tensor.

    Buffers that no state dict has are computed as transformers does when it loads a model. Raises
    ValueError naming the first for which there is no way, and as `Source.get` does.
    """
    values: dict[int, torch.Tensor] = {}
    to = device or torch.device("cpu")
    names = tied_names(model)
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in values or id(tensor) in gone:
                continue
            if not tensor.is_meta:
                if device is not None and tensor.device != device:
                    values[id(tensor)] = tensor.detach().to(device)
            elif id(tensor) in names:  # in the state dict
                if source is None:
                    raise ValueError(
                        f"quantize_: {f'{path}.{name}'.lstrip('.')} is on meta: it has no values; "
                        "say with weights= where they are"
                    )
                found = source.get(names[id(tensor)], tensor.shape)
                # A copy: nothing may keep a whole shard mapped, or change with its source.
                values[id(tensor)] = found.to(to, tensor.dtype, copy=True)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ValueError(
                    f"quantize_: {path}.{name} is on meta and neither a parameter nor a buffer: "
                    "build the model with it on a device"
                )
    for path, module in model.named_modules():
        lost = {name: t for name, t in module._buffers.items() if t is not None and t.is_meta}
        lost = {name: t for name, t in lost.items() if id(t) not in values}
        if lost:
            for name, made in _computed(model, module, path, lost, to).items():
                values[id(lost[name])] = made
    return values


def _computed(
    model: nn.Module,
    module: nn.Module,
    path: str,
    lost: dict[str, torch.Tensor],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The buffers of one module, computed by the `_init_weights` of a transformers model."""
    initialise = getattr(model, "_init_weights", None)
    runs: list[dict[str, torch.Tensor]] = []
    below = list(module.modules())
    real = [dict(m._parameters) for m in below]
    try:
        for m in below:  # what it initialises beside the buffers must not be hurt
            for name, parameter in m._parameters.items():
                if parameter is not None:
                    m._parameters[name] = nn.Parameter(parameter.detach().to("meta"), False)
        # Twice, over different values: a buffer that it leaves alone shows.
        for fill in (0, 1):
            runs.append({n: torch.full_like(t, fill, device=device) for n, t in lost.items()})
            module._buffers.update(runs[-1])
            if callable(initialise):
                with torch.no_grad():
                    initialise(module)
                runs[-1] = {name: _tensor(module._buffers[name]) for name in lost}
    finally:
        module._buffers.update(lost)
        for m, parameters in zip(below, real, strict=True):
            m._parameters.update(parameters)
    for name in lost:
        if not torch.equal(runs[0][name], runs[1][name]):
            raise ValueError(
                f"quantize_: the buffer {f'{path}.{name}'.lstrip('.')} is on meta and in no "
                "checkpoint: build the model with its buffers on a device, or set it first"
            )
    return runs[0]


def _tensor(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value
