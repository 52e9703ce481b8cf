"""How large a model is: parameters, bytes and bits per weight, of its linear layers and of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .nn.keep import HoldsPacked
from .nn.linear import DenseLinear


@dataclass(frozen=True)
class ModelSize:
    """Result of `model_size`.

    parameters, nbytes: of everything learned, embeddings, norms and biases too. linear_parameters,
    linear_nbytes: of the matrices of linear layers. A matrix that several layers share counts once,
    and one that an embedding shares (a tied head) counts as the embedding's. Bytes of packed
    matrices are those in memory: codes, scales, zeros and padding.
    """

    parameters: int
    nbytes: int
    linear_parameters: int
    linear_nbytes: int

    @property
    def bits(self) -> float | None:
        """Bits per parameter of the whole model."""
        return 8 * self.nbytes / self.parameters if self.parameters else None

    @property
    def linear_bits(self) -> float | None:
        """Bits per parameter of the linear layers; None without any."""
        return 8 * self.linear_nbytes / self.linear_parameters if self.linear_parameters else None


def model_size(model: nn.Module) -> ModelSize:
    """Counts a model's parameters: dense, or packed by this package."""
    modules = list(model.modules())
    tables = {id(m.weight) for m in modules if hasattr(m, "num_embeddings")}
    seen: set[int] = set()
    parameters = nbytes = linear_parameters = linear_nbytes = 0
    for module in modules:
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, HoldsPacked) and name == "weight":
                packed = module.packed
                count, size = packed.n * packed.k, packed.nbytes
            else:
                count, size = tensor.numel(), tensor.nbytes
            parameters += count
            nbytes += size
            if name == "weight" and _is_linear(module) and id(tensor) not in tables:
                linear_parameters += count
                linear_nbytes += size
    return ModelSize(parameters, nbytes, linear_parameters, linear_nbytes)


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear layer with its matrix transposed; named, so that transformers need
    # not be there.
    return isinstance(module, (nn.Linear, DenseLinear)) or type(module).__name__ == "Conv1D"
