"""What a request may ask for. What the server would ignore, although it changes the answer, is
refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import refuse, wrong

# Field -> the values with which it changes nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "audio": (),
    "functions": ([],),
    "function_call": ("none",),
    "prediction": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "tool_choice": ("auto", "none"),
}
ROLES = ("system", "developer", "user", "assistant", "tool")


def check_body(body: Mapping[str, Any], chat: bool) -> None:
    """Raises RequestError (status 400) for a body that is none of chat completions, or of
    completions."""
    for name, off in _OFF.items():
        value = body.get(name)
        if value is not None and value not in off:
            raise refuse(name, f"got {value!r}"[:200])
    if chat:
        _check_messages(body.get("messages"))
    elif not isinstance(body.get("prompt"), str) or not body["prompt"]:
        raise wrong(400, "prompt must be a text that is not empty", "prompt")
    for name in ("max_tokens", "max_completion_tokens"):
        _whole(body, name, 1, 1 << 31)
    _whole(body, "seed", -(1 << 63), (1 << 63) - 1)
    _number(body, "temperature", 0.0, 2.0)
    _number(body, "top_p", 0.0, 1.0, above=True)
    _number(body, "frequency_penalty", -0.999, 2.0)
    bias = body.get("logit_bias") or {}
    if not isinstance(bias, Mapping) or not all(
        str(k).isdigit() and isinstance(v, int | float) and -100 <= v <= 100
        for k, v in bias.items()
    ):
        raise wrong(400, "logit_bias must map token ids to numbers from -100 to 100", "logit_bias")
    stop = body.get("stop")
    if stop is not None:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise wrong(400, f"stop must be a text or a list of texts, got {stop!r}"[:200], "stop")
    if not isinstance(body.get("stream", False), bool | None):
        raise wrong(400, f"stream must be true or false, got {body['stream']!r}"[:200], "stream")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise wrong(400, "messages must be a list with at least one message", "messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise wrong(400, f"{where} must have a role of {', '.join(ROLES)}", where)
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                    raise wrong(400, f"{where}: content must be text", where)
        elif not isinstance(content, str) and not message.get("tool_calls"):
            raise wrong(400, f"{where}: content must be text, got {content!r}"[:200], where)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> None:
    value = body.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(400, f"{name} must be an integer of at least {low}, got {value!r}"[:200], name)


def _number(
    body: Mapping[str, Any], name: str, low: float, high: float, above: bool = False
) -> None:
    value = body.get(name)
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not low <= value <= high or (above and value == low):
        limits = f"above {low:g}" if above else f"from {low:g}"
        raise wrong(400, f"{name} must be {limits} to {high:g}, got {value!r}"[:200], name)


def sampled(body: Mapping[str, Any], gen_config: Any) -> None:
    """A temperature, or a share of the probability, asks for sampling, which the model's own
    settings may not do."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is None and top_p is None:
        return
    gen_config.do_sample = temperature is None or temperature > 0
    if not gen_config.do_sample:  # greedy: the rest of sampling would only be warned about
        gen_config.temperature = gen_config.top_p = gen_config.top_k = None


def fit_length(input_ids: Any, gen_config: Any, limit: int) -> None:
    """Cuts what may be generated to the context. Raises RequestError (400) for a prompt that fills
    it. input_ids: a list, or [1, T]."""
    length = len(input_ids) if isinstance(input_ids, list) else input_ids.shape[-1]
    if length < 1:
        raise wrong(400, "the prompt has no tokens", "prompt")
    if length >= limit:
        raise wrong(
            400,
            f"the prompt has {length} tokens, the context is {limit}, one of them for the answer",
            "messages",
            "context_length_exceeded",
        )
    wanted = gen_config.max_new_tokens
    gen_config.max_new_tokens = min(limit - length, wanted or limit)
