"""A step over fixed tensors, recorded once and then repeated: on a GPU as a CUDA graph.

A replay does again what the step did with those tensors, on whatever they hold by then. Nothing of
the step runs on the host any more, so it must neither read results back nor take a length from
Python that changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Step = Callable[[], None]

# torch captures one graph at a time, in a process.
_capturing = threading.Lock()


class Recording(Protocol):
    """A step that can be repeated."""

    def replay(self) -> None: ...


def record(
    step: Step, state: Sequence[torch.Tensor], device: torch.device, memory: Any = None
) -> Recording:
    """Records a step, which may have run by then; what it did to `state` is undone.

    state: the tensors that a step changes and the next one reads. memory: what recordings of one
    device share for what they allocate, from `shared_memory`; they must not run at the same time.
    Raises RuntimeError for a step that cannot be repeated.
    """
    return (
        CudaGraph(step, state, device, memory) if device.type == "cuda" else Replayed(step, state)
    )


def shared_memory(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _rehearse(step: Step, state: Sequence[torch.Tensor]) -> None:
    """Runs the step for what happens once only: libraries make their workspaces, ops look at the
    device. A capture has no room for that."""
    before = [tensor.clone() for tensor in state]
    step()
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)


class Replayed:
    """Where there are no graphs: the step, called again and again on the same tensors."""

    def __init__(self, step: Step, state: Sequence[torch.Tensor]) -> None:
        _rehearse(step, state)
        self._step = step

    def replay(self) -> None:
        self._step()


_capture_streams: dict[torch.device, Any] = {}


def _capture_stream(device: torch.device) -> Any:
    """One of our own for each device: torch keeps one for all captures, on the device of the first.
    And no more than one: libraries have a workspace for every stream that they have seen."""
    if device not in _capture_streams:
        _capture_streams[device] = torch.cuda.Stream(device)
    return _capture_streams[device]


class CudaGraph:
    """The launches of a step. `device` is current where it is made and replayed; a replay goes to
    the current stream."""

    def __init__(
        self, step: Step, state: Sequence[torch.Tensor], device: torch.device, memory: Any
    ) -> None:
        with _capturing:
            self._capture(step, state, device, memory)

    def _capture(
        self, step: Step, state: Sequence[torch.Tensor], device: torch.device, memory: Any
    ) -> None:
        stream = _capture_stream(device)
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            _rehearse(step, state)
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        failed: Exception | None = None
        try:
            # thread_local: what other threads ask of CUDA is none of this capture's business.
            with torch.cuda.graph(
                self._graph, memory, stream=stream, capture_error_mode="thread_local"
            ):
                try:
                    step()
                except Exception as error:  # the capture is ended first: it would hide this error
                    failed = error
        except RuntimeError as error:
            failed = failed or error
        finally:
            torch.cuda.set_stream(
                current
            )  # torch leaves the other one where ending a capture fails
        if failed is not None:
            raise RuntimeError(
                f"this step cannot be captured in a CUDA graph: {failed}"
            ) from failed

    def replay(self) -> None:
        self._graph.replay()
