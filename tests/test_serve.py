"""`qkernels serve`: OpenAI's client against a server in a process of its own."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import write_llama

pytest.importorskip("transformers", reason="the server is that of transformers")
openai = pytest.importorskip("openai", reason="the server needs the extra [serve]")
pytest.importorskip("fastapi", reason="the server needs the extra [serve]")
pytest.importorskip("uvicorn", reason="the server needs the extra [serve]")
pytest.importorskip("typer", reason="the command line needs the extra [cli]")

import qkernels as qk  # noqa: E402
from qkernels.hf.serve.handlers import application  # noqa: E402
from qkernels.hf.serve.model import served_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
KEY = "a key"
# Without the tokens that are no printable character of ASCII, and without the end.
PRINTABLE = {str(i): -100 for i in (*range(32), *range(127, 256), *range(264, 280))}
SHARED: dict[str, Any] = {"logit_bias": {}}  # all that requests in slots can ask for
LONG = 8000  # tokens: seconds of work, where a cancelled request takes a fraction of one
START, STOP = 120, 30  # seconds


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny.gguf"
    return write_llama(path, context=16384, layers=1, vocab=280, output="Q8_0")


@dataclass
class Server:
    process: Any
    url: str
    lines: list[str]

    def client(self, **options: Any) -> Any:
        given = {"base_url": self.url, "api_key": KEY, "max_retries": 0, "timeout": 60}
        return openai.OpenAI(**{**given, **options})


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    words = [sys.executable, "-m", "qkernels.cli", "serve", str(model), "--port", "0"]
    words += ["--api-key", KEY, "--threads", "1", "--act", "float", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    lines: list[str] = []
    listening = threading.Event()

    def read() -> None:
        for line in process.stderr:  # type: ignore[union-attr]
            lines.append(line)
            if "serving on" in line:
                listening.set()
        listening.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert listening.wait(START), lines
        found = [line.split()[2] for line in lines if "serving on" in line]
        assert found, lines
        yield Server(process, found[0], lines)
    finally:
        process.kill()
        process.wait(STOP)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with serving(tiny) as made:
        yield made


@pytest.fixture(scope="module")
def slots(tiny: Path) -> Iterator[Server]:
    with serving(tiny, "--slots", "2") as made:
        yield made


def ask(client: Any, text: str, **options: Any) -> Any:
    given = {"model": "tiny", "temperature": 0, "max_tokens": 12, "logit_bias": PRINTABLE}
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(messages=messages, **{**given, **options})


def answer(client: Any, text: str, **options: Any) -> str:
    return ask(client, text, **options).choices[0].message.content


# OpenAI's client


def test_streams(server: Server) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == ["tiny"]
    chunks = list(ask(client, "hello", stream=True))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert len(pieces) > 2
    assert "".join(pieces) == answer(client, "hello")
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], stream=True, max_tokens=2
    ) as raw:
        events = [line for line in raw.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in events)


def test_answers_are_those_of_the_decoder(server: Server, tiny: Path) -> None:
    decoder = qk.QuantDecoder.from_pretrained(tiny, device="cpu", act="float")
    for prompt in ("hello world", "a"):
        made = server.client().completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0
        )
        ours = decoder.generate(prompt, max_new_tokens=20, temperature=0)
        assert made.choices[0].text == ours.texts[0]
        assert made.usage.prompt_tokens == len(decoder.encode(prompt))


def test_the_example_of_the_document_runs(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/serving.md").read_text()
    (code,) = (block.split("```")[0] for block in text.split("```python\n")[1:])
    assert "http://localhost:8000/v1" in code and 'api_key="none"' in code
    code = code.replace("http://localhost:8000/v1", server.url).replace('"none"', repr(KEY))
    exec(compile(code, "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out


def test_answers_many_at_once(server: Server) -> None:
    client = server.client()
    texts = [f"hello {i}" for i in range(6)]
    alone = [answer(client, text) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda text: answer(client, text), texts))
    assert together == alone


def test_a_seed_belongs_to_its_request(server: Server) -> None:
    client = server.client()
    seeds = [1, 2, 3] * 2
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda s: answer(client, "x", temperature=1.5, seed=s), seeds))
    assert made[:3] == made[3:] and len(set(made)) > 1


def quick(server: Server, pace: float, **options: Any) -> None:
    """The next request is answered long before LONG tokens could have been."""
    start = time.monotonic()
    ask(server.client(), "hello", max_tokens=1, **options)
    assert time.monotonic() - start < LONG * pace / 3


def seconds_per_token(server: Server, **options: Any) -> float:
    start = time.monotonic()
    made = ask(server.client(), "hello", max_tokens=200, **options)
    assert made.usage.completion_tokens == 200  # nothing ends an answer early here
    return (time.monotonic() - start) / 200


@pytest.fixture(scope="module")
def pace(server: Server) -> float:
    return seconds_per_token(server)


def test_a_client_that_goes_away_frees_its_slot(server: Server, pace: float) -> None:
    stream = ask(server.client(), "hello", stream=True, max_tokens=LONG)
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    stream.close()
    quick(server, pace)


def test_so_does_one_that_waits_for_a_whole_answer(server: Server, pace: float) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(server.client(timeout=0.5), "hello", max_tokens=LONG)
    quick(server, pace)


def test_and_one_whose_turn_has_not_come(server: Server, pace: float) -> None:
    first = ask(server.client(), "hello", stream=True, max_tokens=LONG)
    next(iter(first))
    for stream in (True, False):  # both wait behind the first
        with pytest.raises(openai.APITimeoutError):
            for _ in ask(server.client(timeout=0.5), "hi", stream=stream, max_tokens=LONG):
                time.sleep(0.01)
    first.close()
    quick(server, pace)


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"n": 2}, 400, "n"),
        ({"messages": [{"role": "user", "content": "x" * 20000}]}, 400, "messages"),
        ({"extra_body": {"wrong": 1}}, 422, None),
    ],
)
def test_errors_are_those_of_openai(
    options: dict[str, Any], status: int, param: str | None, server: Server
) -> None:
    given = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **options}
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().chat.completions.create(**given)
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.body["param"] == param
    assert caught.value.body["type"] == "invalid_request_error"


def test_the_key_is_asked_for(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key"):
        ask(server.client(api_key="another"), "hello")


def test_ctrl_c_ends_it(server: Server) -> None:
    stream = ask(server.client(), "hello", stream=True, max_tokens=LONG)
    next(iter(stream))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(STOP) == 130
    assert server.process.stdout.read() == ""
    assert not [line for line in server.lines if "Traceback" in line]
    assert server.lines[-1] == "interrupted\n"


# Its client against a server that computes requests together


def test_slots_stream(slots: Server) -> None:
    client = slots.client()
    chunks = list(ask(client, "hello", stream=True, **SHARED))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert len(pieces) > 2
    assert "".join(pieces) == answer(client, "hello", **SHARED)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12


def test_slots_answer_many_at_once(slots: Server) -> None:
    client = slots.client()
    texts = [f"{'hello ' * i}{i}" for i in range(6)]
    alone = [answer(client, text, max_tokens=40, **SHARED) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(answer, client, t, max_tokens=40, **SHARED) for t in texts]
        together = [made.result() for made in asked]
    assert together == alone and len(set(alone)) > 1


def test_clients_that_go_away_free_their_slots(slots: Server) -> None:
    """One slot stays taken: the next request needs that of the client that went away."""
    pace = seconds_per_token(slots, **SHARED)
    long = {"max_tokens": LONG, **SHARED}
    stays = ask(slots.client(), "hello", stream=True, **long)
    next(iter(stays))
    goes = ask(slots.client(), "hi", stream=True, **long)
    for _, _chunk in zip(range(5), goes, strict=False):
        pass
    for stream in (True, False):  # both wait for a slot
        with pytest.raises(openai.APITimeoutError):
            list(ask(slots.client(timeout=0.5), "x", stream=stream, **long))
    goes.close()
    quick(slots, pace, **SHARED)
    with pytest.raises(openai.APITimeoutError):
        ask(slots.client(timeout=0.5), "hi", **long)
    quick(slots, pace, **SHARED)
    assert next(iter(stays)).choices[0].finish_reason is None
    stays.close()
    quick(slots, pace, **SHARED)


def test_ctrl_c_ends_slots(slots: Server) -> None:
    stream = ask(slots.client(), "hello", stream=True, max_tokens=LONG, **SHARED)
    next(iter(stream))
    slots.process.send_signal(signal.SIGINT)
    assert slots.process.wait(STOP) == 130
    assert not [line for line in slots.lines if "Traceback" in line]
    assert slots.lines[-1] == "interrupted\n"


# Requests that are computed together, without a process


async def post(
    app: Any, path: str, body: dict[str, Any], turns: int | None = None
) -> tuple[int, Any] | None:
    """What an ASGI application answers to JSON; None to a client that leaves after so many turns
    of the event loop."""
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"", "http_version": "1.1", "scheme": "http", "client": ("here", 1),
        "server": ("there", 2), "root_path": "", "asgi": {"version": "3.0"},
    }  # fmt: skip
    coming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if coming:
            return coming.pop()
        if turns is None:
            await asyncio.Event().wait()  # the client stays
        for _ in range(turns or 0):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if turns is not None:
        return None
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


async def end(app: Any) -> None:
    """Starts and ends an ASGI application: threads that it has end too."""
    events = ["lifespan.shutdown", "lifespan.startup"]

    async def receive() -> Any:
        return {"type": events.pop()}

    async def send(message: Any) -> None:
        assert "failed" not in message["type"], message

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)


def test_requests_are_computed_together(tiny: Path) -> None:
    served = served_model(tiny, act="float", context=256, replace_layers=False)
    loaded = (served.model, served.tokenizer)
    prompts = ["hello", "a world", "x"]
    bodies: list[dict[str, Any]] = [
        {"prompt": p, "max_tokens": 10, "temperature": 0} for p in prompts
    ]
    # Two at a time: the third waits for a slot. float16 or not, both are greedy in float32.
    apps = {slots: application("tiny", loaded, limit=256, slots=slots) for slots in (0, 2)}

    async def all_of(app: Any) -> list[tuple[int, Any]]:
        return await asyncio.gather(*(post(app, "/v1/completions", body) for body in bodies))

    one_by_one, together = (asyncio.run(all_of(app)) for app in apps.values())
    assert not [s for _, s in (*one_by_one, *together) if "error" in s]
    texts = [[said["choices"][0]["text"] for _, said in answers]
             for answers in (one_by_one, together)]  # fmt: skip
    assert texts[0] == texts[1] and all(texts[0])
    for wrong in ({"temperature": 0.5}, {"seed": 3}, {"stop": "x"}, {"frequency_penalty": 0.5}):
        status, said = asyncio.run(post(apps[2], "/v1/completions", {**bodies[0], **wrong}))
        assert status == 400 and said["error"]["code"] == "unsupported_parameter", said
    for app in apps.values():
        asyncio.run(end(app))


@pytest.mark.parametrize("slots", [0, 2])
def test_a_client_may_go_at_any_step(slots: int, tiny: Path) -> None:
    """Between any two steps of the event loop, also before the first piece of its answer."""
    served = served_model(tiny, act="float", context=4096, replace_layers=False)
    app = application("tiny", (served.model, served.tokenizer), limit=4096, slots=slots)
    steps: list[int] = []
    served.model.register_forward_hook(lambda *_: steps.append(1))
    body: dict[str, Any] = {"prompt": "hello", "max_tokens": 1000, "temperature": 0}
    if not slots:
        body["logit_bias"] = PRINTABLE
    last = {**body, "max_tokens": 1}

    async def leave() -> list[tuple[bool, int, int]]:
        most = []
        assert await post(app, "/v1/completions", body) is not None
        assert len(steps) > 900  # of a client that stays
        for stream in (True, False):
            for turns in range(24):
                steps.clear()
                await post(app, "/v1/completions", {**body, "stream": stream}, turns)
                answered = await post(app, "/v1/completions", last)
                assert answered is not None and answered[0] == 200
                at = -1
                while slots and at != len(steps):  # the other slot may be computing
                    at = len(steps)
                    await asyncio.sleep(0.05)
                most.append((stream, turns, len(steps)))
        return most

    try:
        assert not [(s, t, n) for s, t, n in asyncio.run(leave()) if n > 100]
    finally:
        asyncio.run(end(app))


# The command


def test_the_command_refuses_in_one_line(tiny: Path) -> None:
    from typer.testing import CliRunner

    from qkernels.cli.app import app
    from qkernels.cli.serve import listen

    taken = listen("localhost", 0)
    for words, said in (
        (["nowhere.gguf"], "no such file"),
        ([str(tiny), "--port", str(taken.getsockname()[1])], "in use"),
        ([str(tiny), "--port", "0", "--context", "99999"], "context"),
        ([str(tiny), "--port", "0", "--attn", "abacus"], "abacus"),
        ([str(tiny), "--port", "0", "--spec", "W4A16"], "quantized already"),
        ([str(tiny), "--port", "0", "--group-size", "32"], "--spec"),
        ([str(tiny), "--port", "0", "--host", "no.such.host.invalid"], "--host"),
    ):
        result = CliRunner().invoke(app, ["serve", *words])
        assert result.exit_code == 2 and result.stdout == "", (words, result.stderr)
        (line,) = result.stderr.splitlines()
        assert line.startswith("qkernels: ") and said in line
    taken.close()
