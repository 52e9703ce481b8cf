"""`QuantDecoder`: a language model with packed weights, from a checkpoint to streamed text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from .. import backends, devices
from ..generate import (
    MAX_BATCH,
    PREFILL_CHUNK,
    GenerationOutput,
    GenerationSettings,
    Loop,
    Request,
    TextAssembler,
    TextStream,
    check_prompt,
)
from ..loading import Checkpoint, Progress, Weight, placed
from ..models import ModelConfig
from ..ops.linear import default_act_group, resolve_act
from ..ops.registry import REFERENCE
from ..quant import PackedWeight, QuantSpec, scheme_act
from ..text import Text, text_of
from .arguments import (
    Prompt,
    asked_types,
    check_input_ids,
    check_values,
    context_length,
    load,
    prompt_list,
    spec_of,
)
from .executor import ComposedExecutor, Executor, NativeExecutor, column_orders
from .keep import HoldsPacked
from .native import STEP_OPS, WeightUse, refusal, uses_of
from .parts import angles, module_of
from .pool import ChatMemory, pool_for
from .program import Linear, Norm, Step, lower
from .steps import BATCHES, DeviceSteps


@dataclass
class DecoderOutput:
    """logits: [B, T, vocab] float32, as in transformers."""

    logits: torch.Tensor


class QuantDecoder(nn.Module):
    """A decoder-only language model whose matrices are packed weights. Make one with
    `from_pretrained`.

    config: its ModelConfig. act: "int8" or "float", how activations enter the matrices. dtype: of
    the activations between them. kv_dtype: of the cache. What of these was "auto" follows the
    device, also after `.to(device)`. max_seq_len: tokens of the longest sequence, prompt included.
    settings: defaults of the generation. raw_config, generation: contents of the model's
    config.json and generation_config.json, {} where it came with none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device | None = None,
        act: str = "auto",
        dtype: str | torch.dtype = "auto",
        kv_dtype: str | torch.dtype = "auto",
        max_seq_len: int | None = None,
        tokenizer: Any = None,
        started: float | None = None,
    ) -> None:
        """Arguments as in `from_pretrained`; device None: where the weights of the checkpoint
        are."""
        super().__init__()
        started = time.perf_counter() if started is None else started
        config = checkpoint.config
        self.config: ModelConfig = config
        self.source = checkpoint.source
        where = None if device is None else devices.resolve(device)
        self._asked = asked_types(act, dtype, kv_dtype)
        self._float16 = (
            checkpoint.raw_config.get("dtype") or checkpoint.raw_config.get("torch_dtype")
        ) == "float16"
        self.max_seq_len = context_length(max_seq_len, config)
        self._family = checkpoint.family
        steps = checkpoint.family.program(config)
        eps = {s.weight: s.eps for s in steps if isinstance(s, Norm)}
        for name, weight in checkpoint.weights.items():
            path, _, part = name.rpartition(".")
            if part == "weight":
                bias = checkpoint.weights.get(f"{path}.bias")
                if bias is not None:
                    bias = placed(bias, where)
                module = module_of(name, placed(weight, where), bias, eps, self._asked["act"])
                self._attach(path, module)
        self._steps = steps
        self._executor: tuple[tuple[str, str], Executor] | None = None
        self._resolved: dict[str, Weight] | None = None
        self._text: Text | None = None
        # Without the weights: they would stay in memory beside those that `.to(device)` made.
        source = replace(checkpoint, weights={})
        self._make_text: Callable[[], Text] = lambda: text_of(source, tokenizer)
        self._defaults: GenerationSettings | None = None
        self.generation: dict[str, Any] = checkpoint.generation
        self.raw_config: dict[str, Any] = checkpoint.raw_config
        self._chat: ChatMemory | None = None
        self._device_steps: DeviceSteps | None = None
        self.load_seconds = time.perf_counter() - started

    @classmethod
    def from_pretrained(
        cls,
        path_or_model: Any,
        spec: QuantSpec | str | None = None,
        device: str | torch.device = "auto",
        act: str = "auto",
        kv_dtype: str | torch.dtype = "auto",
        max_seq_len: int | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        embeddings: QuantSpec | str | None = None,
        tokenizer: Any = None,
        progress: Progress | None = None,
    ) -> QuantDecoder:
        """Loads a model.

        path_or_model: a GGUF file, a directory with config.json and safetensors or with one GGUF
        file, or a
            transformers model.
        spec: how the matrices of a float checkpoint are quantized, as a QuantSpec or a scheme like
        "W4A16"; None keeps
            them in its type. GGUF files are quantized already. embeddings: the same for the table
            of embeddings, and with tied weights for the head.
        device: "cpu", "cuda" (the current GPU), "cuda:1", or "auto": a GPU that can be used, else
        the CPU. act: "int8" quantizes activations at run time, "float" does not; "auto" is what a
        scheme given as `spec` says, else "int8" on a CPU and "float" on a GPU. dtype: of
        activations: "auto" is float32 on a CPU; on a GPU float16 for a checkpoint whose config.json
        says so, and bfloat16 for all others, float32 and GGUF ones too. kv_dtype: of the KV cache:
        float32, float16, bfloat16, int8 or int4; "auto" is float16, on a GPU the type of the
        activations. max_seq_len: tokens of the longest sequence; None: what the model was made for,
        at most 32768. tokenizer: a transformers tokenizer, where the model does not come with one.
        progress: called as progress(done, total, name of the tensor).

        Raises RuntimeError for a GPU that cannot be used, with the reason; CheckpointError (a
        ValueError) for a damaged or incomplete checkpoint, UnsupportedModelError (a ValueError) for
        a model that there is no code for, ValueError for other arguments, FileNotFoundError for a
        path.
        """
        started = time.perf_counter()
        where = devices.resolve(device)
        asked_types(act, dtype, kv_dtype)  # before minutes of loading
        if act == "auto" and isinstance(spec, str):
            # W4A16 asks for float activations, W4A8 for int8.
            act = scheme_act(spec)
        checkpoint = load(path_or_model, spec_of(spec), spec_of(embeddings), progress, where)
        return cls(
            checkpoint,
            act=act,
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_seq_len=max_seq_len,
            tokenizer=tokenizer,
            started=started,
        )

    # Weights and how they run

    def _attach(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *parents, last = path.split(".")
        for part in parents:
            if part not in parent._modules:
                following = path.split(f"{part}.", 1)[1].split(".")[0]
                parent.add_module(part, nn.ModuleList() if following.isdigit() else nn.Module())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.add_module(last, module)

    def weights(self) -> dict[str, Weight]:
        """The weights by the names of the program, on the modules' tensors."""
        if self._resolved is None:
            resolved: dict[str, Weight] = {}
            for path, module in self.named_modules():
                for part, tensor in module.named_parameters(recurse=False):
                    resolved[f"{path}.{part}"] = tensor.detach()
                    if isinstance(module, HoldsPacked) and part == "weight":
                        resolved[f"{path}.{part}"] = module.packed
            for name, rope in self.config.ropes.items():
                resolved[name] = angles(rope, self.max_seq_len).to(self.device)
            self._resolved = resolved
        return self._resolved

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> QuantDecoder:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _forget(self) -> None:
        """Drops what holds the tensors, or their device, from before."""
        self._resolved = self._executor = self._chat = self._device_steps = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes these again: a native plan belongs to one executor and its tensors.
        own = ("_resolved", "_executor", "_chat", "_device_steps")
        return {**self.__dict__, **dict.fromkeys(own)}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def act(self) -> str:
        return resolve_act(self._asked["act"], self.device)

    @property
    def dtype(self) -> torch.dtype:
        asked = self._asked["dtype"]
        if asked == "auto" and self.device.type != "cuda":
            asked = "float32"
        elif asked == "auto":
            asked = "float16" if self._float16 else "bfloat16"
        found: torch.dtype = getattr(torch, asked)
        return found

    @property
    def kv_dtype(self) -> str:
        asked = self._asked["kv_dtype"]
        if asked != "auto":
            return asked
        return "bfloat16" if self.dtype == torch.bfloat16 else "float16"

    def executor(self) -> Executor:
        """What runs the program under the backend in force; made when first needed."""
        key = backends.current()
        if self._executor is None or self._executor[0] != key:
            made: Executor
            if self.composed_because() is None:
                made = NativeExecutor(self.lowered(), self.weights())
            else:
                made = ComposedExecutor(self.lowered(), self.weights(), self.dtype)
            self._executor = (key, made)
        return self._executor[1]

    @property
    def decodes_on_device(self) -> bool:
        """Whether decoding keeps its state on the device, and the host reads tokens alone."""
        return self.device.type == "cuda"

    def steps(self) -> DeviceSteps:
        """The cache and the steps of decoding on the device; made when first needed."""
        if self._device_steps is None:
            self._device_steps = DeviceSteps(self)
        return self._device_steps

    def warmup(self, batches: Sequence[int] = BATCHES) -> None:
        """Does now what would make the first tokens slow: on a GPU, a prefill, and a step for each
        of these numbers of sequences, which is captured as a CUDA graph (in some 0.1 s each; others
        are filled up to the next of 1, 2, 4, 8, 16 and 32, the default). On a CPU a short prefill.

        Raises ValueError for a number of sequences that are not decoded together.
        """
        for count in batches:
            if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= MAX_BATCH:
                raise ValueError(
                    f"warmup: sequences decoded together are 1 to {MAX_BATCH}, got {count!r}"
                )
        length = PREFILL_CHUNK if self.decodes_on_device else 2
        self(torch.zeros(1, min(length, self.max_seq_len), dtype=torch.int64), logits_to_keep=1)
        if self.decodes_on_device:
            self.steps().warm_up(batches)

    def lowered(self) -> tuple[Step, ...]:
        """The program as executors run it, with activations quantized as `act` says."""
        return lower(self._steps, self._act_group, column_orders(self.weights()).get)

    def _act_group(self, name: str) -> int:
        """Columns per scale of the int8 activations that enter weight `name`; 0: float ones."""
        weight = self.weights()[name]
        if self.act == "float" or not isinstance(weight, PackedWeight):
            return 0
        return default_act_group(weight)

    def uses(self) -> list[WeightUse]:
        """What the program does with its matrices, in its order."""
        return uses_of(self._steps, self.weights(), self._act_group)

    def composed_because(self) -> str | None:
        """Why the model runs op by op and not as one native call per step; None if it does run
        natively.
        """
        return refusal(self.uses(), self.device, self.dtype)

    def uncaptured_because(self) -> str | None:
        """Why a decode step on a GPU is not captured as a CUDA graph; None if it is."""
        device, facts = self.device.type, backends.facts_of(self.device)
        cases: list[tuple[str, dict[str, Any]]] = [(op, {}) for op in (*STEP_OPS, "sample")]
        cases += [(u.op, u.case) for u in self.uses() if isinstance(u.weight, PackedWeight)]
        for op, case in cases:
            choice = backends.choose(op, device, {**case, **facts})
            if choice.row.namespace == REFERENCE:  # it looks at what tensors hold
                why = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons)
                return f"the row {choice.row.name!r} computes {op}{f' ({why})' if why else ''}"
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that one decode step reads: all but a table that only the lookup
        uses.
        """
        used = {s.weight for s in self._steps if isinstance(s, Linear)}
        table = next(iter(self.children())) if "embed.weight" not in used else None
        unused = (
            0 if table is None else sum(t.nbytes for t in (*table.parameters(), *table.buffers()))
        )
        return self.nbytes - unused

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> DecoderOutput:
        """Logits of whole sequences, without a cache that lasts.

        input_ids: [B, T] integers -> logits [B, T, vocab] float32, or [B, logits_to_keep, vocab] of
        the last positions.
        Raises ValueError for ids out of range or longer than the context, TypeError for other
        types.
        """
        count, length, keep = check_input_ids(input_ids, logits_to_keep)
        prompts = [
            check_prompt(row, self.config.vocab, self.max_seq_len, f"input_ids[{i}]")
            for i, row in enumerate(input_ids.tolist())
        ]
        logits = torch.empty(count, keep, self.config.vocab, device=self.device)
        for row, prompt in enumerate(prompts):
            pool = pool_for(self, [length])
            handle = pool.add()
            for start in range(0, length, PREFILL_CHUNK):
                stop = min(start + PREFILL_CHUNK, length)
                wanted = max(start, length - keep)  # rows from here on are kept
                out = pool.forward([(handle, prompt[start:stop])], last_only=stop <= wanted)
                if stop > wanted:
                    logits[row, wanted - (length - keep) : stop - (length - keep)] = out[
                        wanted - start :
                    ]
        return DecoderOutput(logits)

    # Text

    @property
    def text(self) -> Text:
        """Between text and token ids: made when first needed."""
        if self._text is None:
            self._text = self._make_text()
        return self._text

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer as a transformers tokenizer (needs transformers; made when first
        asked for).
        """
        return self.text.transformers

    @property
    def settings(self) -> GenerationSettings:
        """Generation settings of the model: its generation_config.json, and the ends of sequence of
        its tokenizer.
        """
        if self._defaults is None:
            settings = GenerationSettings.from_generation_config(self.generation)
            if not settings.eos_ids:
                eos = self.raw_config.get("eos_token_id")
                listed = (
                    tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
                )
                settings = settings.updated(eos_ids=listed or self._eos_of_tokenizer())
            self._defaults = settings
        return self._defaults

    def _eos_of_tokenizer(self) -> tuple[int, ...]:
        try:
            return self.text.eos_ids
        except LookupError:  # without a tokenizer there are ids only, and no end of sequence
            return ()

    def encode(self, prompt: Prompt, which: str = "prompt") -> list[int]:
        """Checked token ids of a prompt: a text, or ids as a list or a one-dimensional tensor."""
        ids: Sequence[int]
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{which}: expected a text, got an empty one")
            ids = self.text.encode(prompt)
        elif isinstance(prompt, torch.Tensor):
            check_values(which, prompt)
            if prompt.dim() != 1 or prompt.is_floating_point():
                raise ValueError(
                    f"{which}: expected integer ids of shape [T], got {prompt.dtype} "
                    f"{list(prompt.shape)}"
                )
            ids = prompt.tolist()
        elif not isinstance(prompt, Sequence):
            raise TypeError(
                f"{which}: expected a text or a list of token ids, got {type(prompt).__name__}"
            )
        else:
            ids = cast(Sequence[int], prompt)
        return check_prompt(ids, self.config.vocab, self.max_seq_len, which)

    def _request(self, index: int, ids: list[int], settings: GenerationSettings) -> Request:
        return Request(
            index, list(ids), len(ids), TextAssembler(self.text.stream_decoder(), settings.stop)
        )

    def _room(self, request: Request, settings: GenerationSettings) -> int:
        return min(request.prompt + settings.max_new_tokens, self.max_seq_len)

    def stream(self, prompt: Prompt, **changes: Any) -> TextStream:
        """Text of one prompt as it is decoded: an iterator over pieces that never break a
        character.

        prompt: text or ids. changes: of `settings`, see GenerationSettings. The stream then has
        .text, .tokens,
        .finish_reason and .timings. Raises ValueError or TypeError before anything runs.
        """
        start = time.perf_counter()
        settings = self.settings.updated(**changes)
        request = self._request(0, self.encode(prompt), settings)
        pool = pool_for(self, [self._room(request, settings)])
        loop = Loop(pool, [request], settings, self.max_seq_len, decode=pool.decode)
        return TextStream(request, loop, loop.run(start), self.load_seconds)

    def generate(self, prompts: Prompt | Sequence[Prompt], **changes: Any) -> GenerationOutput:
        """Completes one prompt or a list of prompts of any lengths, together, each until its own
        end.

        prompts: a text, a list of ids, or a list of these. changes: of `settings`. Raises as
        `stream` does.
        """
        start = time.perf_counter()
        settings = self.settings.updated(**changes)
        listed = prompt_list(prompts)
        requests = []
        for i, prompt in enumerate(listed):
            which = "prompt" if len(listed) == 1 else f"prompt {i}"
            requests.append(self._request(i, self.encode(prompt, which), settings))
        # Room for the largest sequences that can be there at once.
        rooms = sorted((self._room(r, settings) for r in requests), reverse=True)[:MAX_BATCH]
        pool = pool_for(self, rooms)
        loop = Loop(pool, requests, settings, self.max_seq_len, decode=pool.decode)
        texts = [""] * len(requests)
        for piece in loop.run(start):
            texts[piece.index] += piece.text
        loop.timings.load = self.load_seconds
        return GenerationOutput(
            texts, [r.new for r in requests], [r.finish or "length" for r in requests], loop.timings
        )

    def chat(
        self, messages: Sequence[Mapping[str, str]], stream: bool = True, **changes: Any
    ) -> TextStream | GenerationOutput:
        """The answer to a conversation, by the model's chat template.

        messages: [{"role": "user", "content": "..."}, ...]. stream: a TextStream, else a
        GenerationOutput. The keys and values of the conversation stay in memory, and what the next
        call has in common with it is not computed again;
        `reset_chat` forgets them. Raises ValueError for messages or a model without a template, and
        as `stream` does.
        """
        start = time.perf_counter()
        settings = self.settings.updated(**changes)
        ids = check_prompt(
            self.text.chat(messages), self.config.vocab, self.max_seq_len, "conversation"
        )
        if self._chat is None:
            self._chat = ChatMemory(self)
        request = self._request(0, ids, settings)
        memory = self._chat.take(request)
        pool = memory.pool
        loop = Loop(pool, [request], settings, self.max_seq_len, keep=True, decode=pool.decode)
        loop.timings.reused_tokens = request.done
        answer = TextStream(
            request, loop, memory.watch(request, loop.run(start)), self.load_seconds
        )
        if stream:
            return answer
        text = "".join(answer)
        return GenerationOutput([text], [request.new], [request.finish or "length"], loop.timings)

    def reset_chat(self) -> None:
        """Frees what `chat` keeps between calls."""
        self._chat = None
