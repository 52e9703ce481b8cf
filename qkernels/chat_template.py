"""Chat templates: Jinja programs that come with a model, so they run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

MINIMUM_JINJA = (3, 1, 6)  # older sandboxes can be left


class ChatTemplateError(ValueError):
    """There is no chat template, it does not run, or it refuses the messages."""


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    try:
        import jinja2
        from jinja2 import ext, nodes, parser, sandbox
    except ImportError as error:
        raise ImportError("chat templates need the package jinja2. Type\n    pip install 'jinja2>=3.1.6'") from error
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < MINIMUM_JINJA:
        raise ImportError(
            f"chat templates need jinja2 >= 3.1.6, this is {jinja2.__version__}. Type\n    pip install -U jinja2"
        )

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's part for training; here it is plain text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which a model was not trained on.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"the chat template does not compile: {error}") from error


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt of a conversation.

    messages: dicts with "role" and "content" (and whatever else the template knows). tools: JSON schemas.
    variables: further names of the template, such as bos_token or documents.
    Raises `ChatTemplateError` if the template fails or refuses, TypeError for what is not plain data.
    """
    compiled = _compiled(template)
    import jinja2

    if isinstance(messages, (str, bytes, Mapping)) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError("messages: expected a list of dicts such as {'role': 'user', 'content': 'Hello'}")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise TypeError(f"messages[{i}]: expected a dict with a 'role', got keys {sorted(map(str, message))}")
    # A template must not get hold of objects with methods: it sees a copy made of plain JSON types.
    given = {"messages": [dict(m) for m in messages], "tools": tools and [dict(t) for t in tools], **variables}
    try:
        plain = json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        raise TypeError(f"chat templates see plain data only (text, numbers, lists, dicts): {error}") from None
    try:
        return compiled.render(**plain, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ChatTemplateError(f"the chat template failed: {error}") from error
