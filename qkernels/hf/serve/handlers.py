"""An OpenAI-compatible server: that of transformers, on a model that this package loaded.

Routes, chat templates, streaming, tool calls and generation are those of `transformers serve`. What
is different here: one model, loaded before the first request and never unloaded; answers stop when
their client goes away, also those that are not streamed; seeds belong to a request; errors are JSON
as OpenAI's; options that would be ignored are refused.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import TimeoutError as StillComputing
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from .asgi import CancelWhenGone, RequireKey, when_gone
from .errors import error_json, refuse, server_error, wrong
from .host import parts
from .requests import check_body, fit_length, sampled

_HOST = parts()
_ModelManager: Any = _HOST["ModelManager"]
_GenerateManager: Any = _HOST["GenerateManager"]
_CBGenerateManager: Any = _HOST["CBGenerateManager"]
_GenerationState: Any = _HOST["GenerationState"]
_ChatCompletionHandler: Any = _HOST["ChatCompletionHandler"]
_CompletionHandler: Any = _HOST["CompletionHandler"]
# Routes of the host that stay: the others load, unload or need other kinds of models.
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")

PAGE, BATCH_TOKENS = 64, 256  # of the host's scheduler
STOP_SECONDS = 10  # that a step may take to end, when the server does

Loaded = tuple[Any, Any]  # model, tokenizer


class OneModel(_ModelManager):
    """The one model of the server, under the name that requests give. close: ends generation."""

    def __init__(
        self, name: str, loaded: Loaded, continuous_batching: bool, close: Callable[[], None]
    ) -> None:
        self._loaded, self._close = loaded, close
        super().__init__(
            device=str(loaded[0].device), force_model=name, continuous_batching=continuous_batching
        )

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # no revisions: it is what answers call the model

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        return self._loaded[1]

    def _load_model(self, model_id_and_revision: str, *_: Any, **__: Any) -> Any:
        return self._loaded[0]

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "qkernels"}]

    def shutdown(self) -> None:
        """Ends generation. The model stays until the process ends."""
        self._close()


class Gone(Exception):
    """The client went away."""


class _Watch:
    """A streamer that streams nothing, and ends `generate` at the next token once `gone` is set."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def put(self, value: Any) -> None:
        if self.gone.is_set():
            raise Gone

    def end(self) -> None:
        pass


class _Job:
    """A model whose `generate` is one request's: it begins with the request's seed, and ends early
    when the server does."""

    def __init__(self, model: Any, gen_config: Any, ending: threading.Event) -> None:
        self._model, self._ending = model, ending
        self._seed: int | None = gen_config.__dict__.pop("request_seed", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        import torch
        from transformers import StoppingCriteriaList

        def ended(*_: Any, **__: Any) -> bool:  # the host adds it to a tensor
            return self._ending.is_set()

        if self._ending.is_set():
            raise Gone
        if self._seed is not None:
            torch.manual_seed(self._seed)
        return self._model.generate(stopping_criteria=StoppingCriteriaList([ended]), **kwargs)


class OneByOne(_GenerateManager):
    """Answers one request after the other, in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = threading.Event()

    def stop(self) -> None:
        """Ends generation after the token that is computed. A thread that still computes while the
        interpreter ends can abort the process."""
        self._ending.set()
        with suppress(StillComputing):
            self.submit(lambda: None).result(STOP_SECONDS)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        job = _Job(model, gen_config, self._ending)
        made = super().generate_streaming(job, processor, inputs, gen_config, *args, **kwargs)
        when_gone(made[1].cancel)
        return made

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        watch, job = _Watch(), _Job(model, gen_config, self._ending)

        def run() -> Any:
            try:
                return job.generate(
                    **inputs, generation_config=gen_config, tokenizer=processor, streamer=watch
                )
            except Gone:
                return None

        when_gone(watch.gone.set)
        # Shielded: the thread of the host sets the future's result, cancelled or not.
        sequences = await asyncio.shield(asyncio.wrap_future(self.submit(run)))
        length = inputs["input_ids"].shape[-1]
        new = sequences[0, length:]
        return processor.decode(new, skip_special_tokens=True), length, new


# What the host's scheduler has one value of, for all requests.
_SHARED = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "sequence_bias")


class Together(_CBGenerateManager):
    """Answers requests together, by the host's scheduler, which samples all of them alike: as the
    model's own settings say."""

    def init_cb(self, model: Any, gen_config: Any) -> None:
        own = model.generation_config
        sampled = gen_config.do_sample or own.do_sample
        for name in _SHARED if sampled else ("do_sample", "repetition_penalty", "sequence_bias"):
            wanted, there = getattr(gen_config, name, None), getattr(own, name, None)
            if wanted != there and (wanted or there):
                raise refuse(name, f"requests that are computed together share {there!r}")
        if gen_config.stop_strings:
            raise refuse("stop", "requests that are computed together end at the model's own end")
        super().init_cb(model, gen_config)

    def generate_streaming(self, *args: Any, **kwargs: Any) -> Any:
        made = super().generate_streaming(*args, **kwargs)
        when_gone(made[1].cancel)
        return made

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        if self._cb is not None:
            when_gone(partial(self._cb.cancel_request, request_id))
        return await super().generate_non_streaming(
            model, processor, inputs, gen_config, request_id
        )

    def stop(self) -> None:
        """Ends generation after the step that is computed. The host would first finish requests,
        and after two seconds take away what its thread computes with."""
        if self._cb is not None:
            self._cb.stop(block=True, hard_stop=True)


class Generation(_GenerationState):
    """Who generates for a request. slots: requests that are computed together, with room for
    `limit` tokens each; 0: one after the other."""

    def __init__(self, slots: int, limit: int) -> None:
        config = None
        if slots:
            from transformers import ContinuousBatchingConfig

            config = ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=slots * -(-limit // PAGE),
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=slots,
                use_async_batching=False,
                drop_unsupported_processors=False,
            )
        super().__init__(continuous_batching=bool(slots), cb_config=config)
        self._own = Together(config) if slots else OneByOne()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._own

    def shutdown(self) -> None:
        self._own.stop()

    def is_cb_alive(self) -> bool:
        return self._own.is_alive() if isinstance(self._own, Together) else True


class _Requests:
    """What both handlers do with a request before and after the host."""

    chat: bool
    limit: int
    model_manager: Any

    def _validate_request(self, body: dict[str, Any]) -> None:
        check_body(body, self.chat)
        super()._validate_request(body)  # type: ignore[misc]

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        asked, there = body.get("model"), self.model_manager.force_model
        if asked is not None and asked != there:
            raise wrong(404, f"the model {asked!r} does not exist; there is {there!r}", "model",
                        "model_not_found")  # fmt: skip
        return super()._resolve_model(body)  # type: ignore[misc]

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        bias = body.pop("logit_bias", None)
        if bias:  # the host takes no empty one, and no integers in it
            body["logit_bias"] = {token: float(value) for token, value in bias.items()}
        seed = body.pop("seed", None)  # the host would set it now, for whoever generates
        if use_cb and seed is not None:
            raise refuse("seed", "requests that are computed together have one random sequence")
        made = super()._build_generation_config(  # type: ignore[misc]
            body, model_generation_config, use_cb=use_cb
        )
        sampled(body, made)
        if seed is not None:
            made.request_seed = seed
        return made

    def _streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any,
        gen_config: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        fit_length(inputs["input_ids"], gen_config, self.limit)
        response = super()._streaming(  # type: ignore[misc]
            request_id, model, processor, model_id, inputs, gen_config, *args, **kwargs
        )
        response.body_iterator = _finished(response.body_iterator)
        return response

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any,
        gen_config: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        fit_length(inputs["input_ids"], gen_config, self.limit)
        return await super()._non_streaming(  # type: ignore[misc]
            request_id, model, processor, model_id, inputs, gen_config, *args, **kwargs
        )


class Chat(_Requests, _ChatCompletionHandler):
    chat = True


class Completion(_Requests, _CompletionHandler):
    chat = False


_ERROR, _ERROR_END = 'data: {"error": "', '"}\n\n'


async def _finished(events: Any) -> AsyncIterator[str]:
    """The events of a stream, an error among them as JSON of OpenAI, and the event that ends it.
    Closed early, or cancelled, it closes the host's iterator, which then stops generating."""
    async with aclosing(events):
        async for event in events:
            at = event.rfind(_ERROR)
            if at >= 0 and event.endswith(_ERROR_END):
                said = event[at + len(_ERROR) : -len(_ERROR_END)]
                event = f"{event[:at]}data: {error_json(said, 'server_error')}\n\n"
            yield event
    yield "data: [DONE]\n\n"


def application(
    name: str,
    loaded: Loaded,
    *,
    limit: int,
    slots: int = 0,
    api_key: str | None = None,
) -> Any:
    """The ASGI application.

    name: of the model, for clients. loaded: (model, tokenizer) of transformers. limit: tokens of a
    prompt and its answer. slots: how many requests are computed together, by the host's scheduler
    on the host's layers; 0: one after the other, as they come. api_key: what clients have to
    send as a bearer token; None: nothing.
    """
    state = Generation(slots, limit)
    models = OneModel(name, loaded, bool(slots), state.shutdown)
    given = (models, state)
    chat, completion = Chat(*given), Completion(*given)
    chat.limit = completion.limit = limit
    app = _HOST["build_server"](
        models,
        chat,
        completion_handler=completion,
        response_handler=_HOST["ResponseHandler"](*given),
        transcription_handler=_HOST["TranscriptionHandler"](models, state),
        systemone_handler=_HOST["SystemOneHandler"](*given),
        generation_state=state,
    )
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") in ROUTES]
    server_error(app)
    wrapped: Any = CancelWhenGone(app)
    if api_key is not None:
        wrapped = RequireKey(wrapped, api_key)
    return wrapped
