"""The decoder layers of a host, run by the programs of `qkernels/models`.

The host's layer objects stay where they are, with their names, hooks and weights; what changes is
the list that holds them and their `forward`. A pass goes one of three ways:

- the stack: all layers in one native call, where nobody looks in between;
- layer by layer, op by op, where hidden states are asked for, or layers have hooks, or somebody
  calls a layer;
- the host's own forward, where a gradient is asked for, or the inside of a layer is not what was
  replaced any more (adapters, hooks).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ... import backends
from ...models import Family, ModelConfig
from ...nn.executor import ComposedExecutor, Executor, NativeExecutor, column_orders
from ...nn.linear import QuantLinear
from ...nn.native import refusal, uses_of
from ...nn.parts import angles
from ...nn.program import hidden_program, layer_programs, lower
from ...ops.linear import resolve_act
from ...quant import PackedWeight
from .cache import CacheShape, Sequences, is_ours, sequences_of
from .mask import HostAngles, HostMask

Weight = PackedWeight | torch.Tensor

# Hooks of transformers that record outputs only while somebody asks for them.
_RECORDERS = "transformers.utils.output_capturing"
# Arguments with which attention functions learn of several sequences in one row.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "block_sequence_ids")


@dataclass
class Plan:
    """What runs the layers under one backend."""

    key: tuple[Any, ...]
    whole: Executor
    single: list[Executor | None]  # made when needed
    native: bool
    because: str | None  # why it is not
    dtype: torch.dtype  # of the rows


class DecoderStack(nn.ModuleList):
    """The list of a host's decoder layers.

    config, family: what they are. shape: of the cache that new sequences get.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        config: ModelConfig,
        family: Family,
        host_config: Any,
        shape: CacheShape,
    ) -> None:
        super().__init__(layers)
        self.model_config, self.family, self.host_config, self.shape = (
            config,
            family,
            host_config,
            shape,
        )
        self._steps = family.program(config)
        self._plan: Plan | None = None
        self._foreign: str | None = None
        self._warned = False
        self._scan()

    # ---- the host's loop ----

    def __getitem__(self, index: Any) -> Any:
        """The host's forward runs over layers[:all of them]; that is where the stack steps in."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        if index.start in (None, 0) and index.step in (None, 1) and index.stop == len(self):
            return _Loop(self)
        return nn.ModuleList(list(self._modules.values())[index])

    # ---- what the layers are made of ----

    def _matrices(self) -> Iterator[tuple[Any, nn.Module, str]]:
        """(definition, the module that holds it, its path) of every weight of the layers."""
        for d in self.family.weights(self.model_config):
            if d.name.startswith("layers."):
                path, _, part = d.hf.removeprefix("model.layers.").rpartition(".")
                if part == "weight":
                    yield d, self.get_submodule(path), path

    def _scan(self) -> None:
        """Looks at the modules anew: what they are, and whether programs can stand for them."""
        self._plan = None
        self._foreign = None
        layers = list(self._modules.values())
        inner = [m for layer in layers for m in layer.modules() if m is not layer]
        self._watched = [
            (module._modules, list(module._modules.values()))
            for module in (*layers, *inner)
            if module._modules
        ]
        self._inner_hooks = [
            hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self._layer_hooks = [
            hooks for m in layers for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        for d, module, path in self._matrices():
            fits = type(module) is nn.Linear or isinstance(module, QuantLinear)
            if d.is_matrix and not fits:
                self._foreign = f"layers.{path} is a {type(module).__name__}"
                return

    def _forget(self) -> None:
        self._plan = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at its own modules, and makes plans of its own: a native one belongs to its
        # tensors.
        own = ("_plan", "_watched", "_inner_hooks", "_layer_hooks", "_values", "_copied")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self._watched = [({"": None}, [])]  # differs: scanned when first run
        self._inner_hooks = self._layer_hooks = []

    def _weights(self) -> dict[str, Weight]:
        """By the names of the program, on the modules' tensors where the types allow."""
        found: dict[str, Weight] = {}
        self._copied: list[torch.Tensor] = []
        for d, module, _ in self._matrices():
            for part in ("weight", "bias"):
                name = f"{d.name.removesuffix('.weight')}.{part}"
                tensor = module._parameters.get(part)
                if tensor is None:
                    continue
                if part == "weight" and isinstance(module, QuantLinear):
                    found[name] = module.packed
                    continue
                values = tensor.detach()
                if not (part == "weight" and d.is_matrix):
                    offset = d.hf_offset if part == "weight" else 0.0
                    values = values.float() + offset if offset else values.float()
                    if values.data_ptr() != tensor.data_ptr():
                        self._copied.append(tensor)
                found[name] = values
        self._versions = [_version(tensor) for tensor in self._copied]
        for name, rope in self.model_config.ropes.items():
            found[name] = angles(rope, self.shape.max_seq_len).to(self.shape.device)
        return found

    def plan(self, dtype: torch.dtype, fresh: bool = True) -> Plan:
        """What runs the layers now. dtype: of the host's hidden states. fresh: whether to look if
        vectors that had to be copied have changed since."""
        plan = self._plan  # None since the layers have moved, if they have
        if (
            plan is not None
            and plan.key == (*backends.current(), dtype)
            and (not fresh or [_version(tensor) for tensor in self._copied] == self._versions)
        ):
            return plan
        device = next(self.parameters()).device
        rows = torch.float32 if device.type == "cpu" else dtype
        key = (*backends.current(), dtype)
        if device != self.shape.device:
            self.shape = CacheShape(**{**vars(self.shape), "device": device})
        self._values = weights = self._weights()
        self._groups = {
            d.name: 0 if resolve_act(module.act, device) == "float" else module._act_group
            for d, module, _ in self._matrices()
            if isinstance(module, QuantLinear)
        }
        act_group = self._act_group
        steps = hidden_program(self._steps, self.model_config.hidden)
        because = refusal(uses_of(steps, weights, act_group), device, rows)
        lowered = lower(steps, act_group, column_orders(weights).get)
        whole: Executor
        if because is None:
            whole = NativeExecutor(lowered, weights)
        else:
            whole = ComposedExecutor(lowered, weights, rows)
        plan = Plan(key, whole, [None] * len(self), because is None, because, rows)
        self._plan = plan
        return plan

    def _act_group(self, name: str) -> int:
        """Columns per scale of the int8 activations that a weight takes; 0: it takes float ones."""
        return self._groups.get(name, 0)

    def single(self, plan: Plan, layer: int) -> Executor:
        """What runs one layer."""
        found = plan.single[layer]
        if found is None:
            steps = layer_programs(self._steps, self.model_config.hidden)[layer]
            lowered = lower(steps, self._act_group, column_orders(self._values).get)
            found = plan.single[layer] = ComposedExecutor(lowered, self._values, plan.dtype)
        return found

    # ---- which way ----

    def _host_runs(self, hidden: torch.Tensor, named: Mapping[str, Any]) -> bool:
        """Whether the host's own layers have to run."""
        if torch.is_grad_enabled() and (
            hidden.requires_grad or any(p.requires_grad for p in self.parameters())
        ):
            return True
        if self.training and self.host_config.attention_dropout:
            return True
        # A step of decoding: the cache is ours, so that the host's layers could not go on with it.
        # Looking at hundreds of modules would slow it down; what changes inside a layer while a
        # cache is in use counts from the next prompt on.
        if hidden.shape[1] == 1 and is_ours(named.get("past_key_values")):
            return False
        for modules, seen in self._watched:
            if list(modules.values()) != seen:
                self._scan()
                break
        if self._foreign is None and any(self._inner_hooks):
            return _has_hooks(self._inner_hooks)
        if self._foreign is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._foreign}, not what was replaced: the decoder layers run as the host's "
                "own, module by module, and not as one native call",
                stacklevel=2,
            )
        return self._foreign is not None

    def _asked_for_outputs(self, named: Mapping[str, Any]) -> bool:
        """Whether hidden states are wanted. Raises ValueError where attentions are, which nobody
        computes here."""

        if named.get("output_attentions"):
            raise ValueError(
                "output_attentions: replaced layers have no attention weights to return; use "
                "qk.restore_decoder_layers_ first"
            )
        asked = named.get("output_hidden_states")
        if asked is None:
            # Not by getattr: a configuration's own takes some microseconds.
            asked = object.__getattribute__(self.host_config, "__dict__")["output_hidden_states"]
        return bool(asked)

    def runs_whole(self, hidden: torch.Tensor, named: Mapping[str, Any]) -> bool:
        """Whether the stack may run all layers at once."""
        asked = self._asked_for_outputs(named)
        if self._host_runs(hidden, named) or asked:
            return False
        return not (any(self._layer_hooks) and _has_hooks(self._layer_hooks))

    # ---- the ways ----

    def run(
        self,
        hidden: torch.Tensor,
        layer: int | None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        position_embeddings: Any = None,
        **named: Any,
    ) -> torch.Tensor:
        """hidden [B, T, hidden], of the host, through all layers or through one of them."""
        del use_cache, position_embeddings
        padding = _padding_of(attention_mask)
        for name in _PACKED:
            if named.get(name) is not None:
                raise ValueError(f"{name}: replaced layers take one sequence per row")
        if hidden.dim() != 3 or hidden.shape[2] != self.model_config.hidden:
            raise ValueError(
                f"hidden states must be [B, T, {self.model_config.hidden}], got "
                f"{list(hidden.shape)}"
            )
        batch, count, width = hidden.shape
        if batch == 0 or count == 0:
            return hidden.clone()
        plan = self.plan(hidden.dtype, fresh=count > 1 or not is_ours(past_key_values))
        if past_key_values is not None:
            sequences = sequences_of(past_key_values, self.shape)
        else:
            shape = self.shape
            if layer is not None:
                shape = CacheShape(**{**vars(shape), "layers": 1})
            sequences = Sequences(shape)
        number = 0 if layer is not None and past_key_values is None else layer
        step = None if number is None else sequences.pending(number, (batch, count))
        if step is None:
            if number:
                raise ValueError(
                    f"layer {number} was called with a cache in which layer 0 has not put these "
                    "tokens: every layer must take them, in turn"
                )
            in_turn = 0 if layer is None else sequences.shape.layers
            step = sequences.extend(batch, count, padding, position_ids, in_turn)
        try:
            x = hidden.reshape(batch * count, width)
            if step.rows is not None:
                x = x.index_select(0, step.rows)
            x = x.to(plan.dtype).contiguous()
            if x.shape[0]:
                execute = plan.whole if layer is None else self.single(plan, layer)
                y = sequences.run(step, execute, x, number)
            else:
                y = x
        except BaseException:
            sequences.undo(step)
            raise
        y = y.to(hidden.dtype)
        if step.rows is not None:
            y = y.new_zeros(batch * count, width).index_copy_(0, step.rows, y)
        return y.view(batch, count, width)

    def host(self, layer: int, hidden: torch.Tensor, named: dict[str, Any]) -> Any:
        """The host's own forward of a layer."""
        module = self[layer]
        host_angles = named.get("position_embeddings")
        if isinstance(host_angles, HostAngles):
            named = {**named, "position_embeddings": host_angles.made()}
        return type(module).forward(module, hidden, **named)


class _Loop:
    """What the host iterates over: a first step that runs all layers if it may, and then none; else
    the layers one by one."""

    def __init__(self, stack: DecoderStack) -> None:
        self._stack = stack

    def __len__(self) -> int:
        return len(self._stack)

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList(list(self._stack))[index]

    def __iter__(self) -> Iterator[Any]:
        first = _First(self._stack)
        yield first
        if not first.ran_all:
            yield from list(self._stack)[1:]


class _First:
    def __init__(self, stack: DecoderStack) -> None:
        self._stack = stack
        self.ran_all = False

    @torch.compiler.disable  # native calls, and looking at values: nothing to trace
    def __call__(self, hidden_states: torch.Tensor, **named: Any) -> Any:
        stack = self._stack
        self.ran_all = stack.runs_whole(hidden_states, named)
        if self.ran_all:
            return stack.run(hidden_states, None, **named)
        return stack[0](hidden_states, **named)


class LayerForward:
    """The forward of one layer."""

    def __init__(self, stack: DecoderStack, index: int) -> None:
        self.stack, self.index = stack, index

    @torch.compiler.disable
    def __call__(self, hidden_states: torch.Tensor, **named: Any) -> Any:
        self.stack._asked_for_outputs(named)
        if self.stack._host_runs(hidden_states, named):
            return self.stack.host(self.index, hidden_states, named)
        return self.stack.run(hidden_states, self.index, **named)


def _has_hooks(all_hooks: list[Any]) -> bool:
    """Whether there are others than those with which transformers records outputs."""
    return any(
        getattr(hook, "__module__", None) != _RECORDERS
        for hook in chain.from_iterable(hooks.values() for hooks in all_hooks if hooks)
    )


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _padding_of(mask: Any) -> torch.Tensor | None:
    """[B, keys] bool, or None, from what the host hands to a layer as its mask."""
    if mask is None:
        return None
    if isinstance(mask, HostMask):
        if mask.overlaid:
            raise ValueError(
                "the attention mask is more than causal (packed sequences, or one laid over it): "
                "replaced layers take padding only"
            )
        return mask.padding
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.bool()
    what = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask: replaced layers take one of shape [B, tokens], with 0 at padding, and "
        f"the attention implementation that they have set, got {what}"
    )
