"""PEFT on packed layers: `import qkernels.peft`, and LoRA, DoRA and IA3 train on, save beside, and
merge into `qk.nn.QuantLinear`.

Adapters stay in float beside the packed weight, so training and reloading need nothing more than
that. Merging does: a packed weight is decoded, the adapter is added by PEFT's own code, and the sum
is quantized to the same format again. What that cost is measured (`merge_report`) and said in a
`QuantWarning`. Importing this module puts three hooks into PEFT (`register`); without them
`get_peft_model` refuses a packed layer, since PEFT would take its codes for values.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .hf.versions import HostVersionError, require

require("peft")

from peft import PeftType  # noqa: E402  (after the check of its version)
from peft.tuners import ia3, lora  # noqa: E402
from peft.tuners.lora.variants import DoraLinearVariant  # noqa: E402
from peft.tuners.tuners_utils import (  # noqa: E402
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
)

from .convert import QuantWarning  # noqa: E402
from .convert.merge import LayerMerge, MergeReport, fold  # noqa: E402
from .convert.plan import Scheme  # noqa: E402
from .nn.linear import QuantLinear  # noqa: E402

__all__ = ["LayerMerge", "MergeReport", "merge_and_unload", "merge_report", "register"]

# Initialisations that look neither at the weight nor at its inputs.
_INITS = (True, False, "gaussian", "orthogonal")

# What `merge_and_unload` of this module asks for: a format other than the layer's, an algorithm.
_asked: ContextVar[tuple[Scheme | None, str]] = ContextVar("_asked", default=(None, "auto"))


# A plain class, so that a layer of PEFT can become one of ours by its __class__.
if TYPE_CHECKING:
    _Mixin = BaseTunerLayer
else:
    _Mixin = object


class _OnPacked(_Mixin):
    """A tuner layer whose base is packed: PEFT's merge runs on a dense copy of the base, which is
    then quantized; unmerging puts the packed base of before back, bitwise."""

    base_layer: Any  # a QuantLinear

    def get_base_layer(self) -> nn.Module:
        """The packed layer; while PEFT's code needs values, the dense copy."""
        dense: nn.Module | None = self.__dict__.get("_dense")
        return self._packed if dense is None else dense

    @property
    def _packed(self) -> QuantLinear:
        layer: QuantLinear = self.base_layer
        return layer

    @contextmanager
    def _dense_base(self, layer: QuantLinear) -> Iterator[nn.Linear]:
        # In __dict__, where it is no submodule.
        self.__dict__["_dense"] = dense = _dense(layer)
        try:
            yield dense
        finally:
            del self.__dict__["_dense"]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT. Adapters that are merged already are merged again from the original weight,
        so that it is rounded once. Raises what PEFT and `quantize_` raise (values that are not
        finite, a `lora_bias` without a bias); the layer is then as it was."""
        if "_dense" in self.__dict__:  # PEFT's own code calls this while it merges
            super().merge(safe_merge, adapter_names)
            return
        new = check_adapters_to_merge(self, adapter_names)
        if not new:
            return
        before = list(self.merged_adapters)
        original = self._original if before else self._packed
        self.merged_adapters = []
        try:
            with self._dense_base(original) as dense, torch.no_grad():
                super().merge(safe_merge, [*before, *new])
            if self.merged_adapters == before:  # this layer has none of the new ones
                return
            spec, algo = _asked.get()
            names = tuple(self.merged_adapters)
            merged, cost = fold(original, dense, spec, algo, names)
        except BaseException:
            self.merged_adapters = before
            raise
        merged.__dict__["_merge"] = cost
        self.__dict__["_original_base"] = (original,)
        self.base_layer = merged

    @property
    def _original(self) -> QuantLinear:
        layer: QuantLinear = self.__dict__["_original_base"][0]
        return layer

    def unmerge(self) -> None:
        """Puts the packed weight of before the merge back: the very same bits."""
        if "_dense" in self.__dict__:
            super().unmerge()
            return
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        original, merged = self._original, self._packed
        original.to(merged.weight.device)  # it is no submodule, and was not moved with the others
        original.float_dtype = merged.float_dtype
        self.base_layer = original.train(merged.training)
        del self.__dict__["_original_base"]
        self.merged_adapters = []
        getattr(self, "_caches", {}).clear()


class QuantLoraLinear(_OnPacked, lora.Linear):
    """LoRA on a QuantLinear: y = packed(x) + scaling * B A x; or DoRA, which needs the norms of the
    weight's rows, and decodes it in every forward pass.

    A gradient goes through the packed layer to x; int8 activations round in the forward pass and
    count as the identity in the backward pass (a straight-through estimate).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        where = kwargs.get("target_name") or "a packed layer"
        if isinstance(base_layer, BaseTunerLayer):
            raise TypeError(
                f"{where}: a packed layer takes the adapters of one tuner, and has "
                f"{type(base_layer).__name__} already"
            )
        if kwargs.pop("parameter_name", None) is not None:
            raise TypeError(f"{where}: target_parameters cannot name a packed weight")
        # The weight of a packed layer is [N, K], whatever the layers beside it are.
        config = copy.copy(config)
        config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Those that are known to work here; PEFT refuses others by name."""
        known = super().lora_variants
        return {key: known[key] for key in ((), ("use_dora",))}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        init = config.init_lora_weights
        if init not in _INITS:
            raise ValueError(
                f"init_lora_weights={init!r} works on the weight of the layer, and this one is "
                f"packed: take one of {', '.join(map(repr, _INITS))}, or quantize after it"
            )
        if not (config.use_dora or init == "orthogonal"):  # these look at the weight, or its type
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
            return
        with self._dense_base(self._packed):
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        reads_weight = any(
            isinstance(self.lora_variant.get(name), DoraLinearVariant)
            for name in (*self.active_adapters, *(kwargs.get("adapter_names") or ()))
        )
        if reads_weight and not (self.disable_adapters or self.merged):
            with self._dense_base(self._packed):
                return super().forward(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)


class QuantIA3Linear(_OnPacked, ia3.Linear):
    """IA3 on a QuantLinear: its inputs or outputs scaled by a learned vector."""


def _dense(layer: QuantLinear) -> nn.Linear:
    """The layer with decoded float32 values."""
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    weight = layer.packed.dequantize(torch.float32)
    dense._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense._parameters["bias"] = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return dense


def merge_report(model: nn.Module) -> MergeReport:
    """What merging adapters into packed layers cost: every packed layer of `model` (a PeftModel
    with merged adapters, or what `merge_and_unload` returned) that had one merged into it. Empty if
    there is none."""
    found: dict[int, LayerMerge] = {}
    for path, module in model.named_modules():
        cost = module.__dict__.get("_merge") if isinstance(module, QuantLinear) else None
        if cost is not None and id(module) not in found:
            name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            found[id(module)] = cost.named(name)
    return MergeReport(tuple(found.values()))


def merge_and_unload(
    model: Any,
    spec: Scheme | None = None,
    *,
    algo: str = "auto",
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> tuple[nn.Module, MergeReport]:
    """`model.merge_and_unload()` of PEFT, with a choice of format: (the model, what it cost).

    model: a PeftModel. spec: of the merged weights, a scheme or a QuantSpec; None: what each layer
    has. Small changes survive in more bits that fewer would round away. Activations stay as each
    layer has them. algo: as in `qk.quantize_`. Raises ValueError for a format or algorithm that
    does not exist, and what PEFT raises.
    """
    token = _asked.set((spec, algo))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "^merge: ", QuantWarning)  # it is returned
            merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
    finally:
        _asked.reset(token)
    return merged, merge_report(merged)


def register() -> None:
    """Puts the hooks into PEFT, once; importing this module does it.

    They wrap three public methods of `peft.tuners.tuners_utils.BaseTuner`: `inject_adapter`, which
    then gives packed layers the classes of this module or refuses them, and `merge_adapter` and
    `merge_and_unload`, which then say what merging cost. Raises HostVersionError where PEFT lacks
    what they need.
    """
    needed = [
        (BaseTuner, "inject_adapter"),
        (BaseTuner, "merge_adapter"),
        (BaseTuner, "merge_and_unload"),
        (BaseTuner, "_create_and_replace"),
        (BaseTunerLayer, "get_base_layer"),
        (lora.LoraConfig, "_register_custom_module"),
    ]
    gone = [f"{owner.__name__}.{name}" for owner, name in needed if not hasattr(owner, name)]
    if gone:
        raise HostVersionError(f"this version of peft has no {', '.join(gone)}")
    for name, hook in (
        ("inject_adapter", _injecting),
        ("merge_adapter", _saying),
        ("merge_and_unload", _saying),
    ):
        method = getattr(BaseTuner, name)
        if not hasattr(method, "_qkernels"):
            wrapped = functools.wraps(method)(hook(method))
            wrapped.__dict__["_qkernels"] = True
            setattr(BaseTuner, name, wrapped)


def _injecting(inject: Callable[..., Any]) -> Callable[..., Any]:
    def inject_adapter(
        self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        config: Any = self.peft_config[adapter_name]
        kind = config.peft_type
        if kind == PeftType.LORA:
            config._register_custom_module({QuantLinear: QuantLoraLinear})
        elif kind != PeftType.IA3:
            self.__dict__["_create_and_replace"] = _refusing(self._create_and_replace, kind)
        try:
            result = inject(self, model, adapter_name, *args, **kwargs)
        finally:
            self.__dict__.pop("_create_and_replace", None)
        if kind == PeftType.IA3:  # which creates its layers without a look at the weight
            for module in model.modules():
                if type(module) is ia3.Linear and isinstance(module.base_layer, QuantLinear):
                    module.__class__ = QuantIA3Linear
        return result

    return inject_adapter


def _refusing(create: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    def create_and_replace(
        config: Any, adapter: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantLinear):
            where = kwargs.get("current_key") or "a packed layer"
            raise TypeError(
                f"{where}: adapters of type {getattr(kind, 'value', kind)} are not supported on a "
                "packed layer, LORA (DoRA included) and IA3 are; keep the layer dense "
                "(modules_to_not_convert of quantize_), or do not target it"
            )
        return create(config, adapter, target, *args, **kwargs)

    return create_and_replace


def _saying(method: Callable[..., Any]) -> Callable[..., Any]:
    def merging(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        report = merge_report(self.model)
        if report.layers:
            warnings.warn(f"merge: {report.summary()}", QuantWarning, stacklevel=2)
        return result

    return merging


register()
