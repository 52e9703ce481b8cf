"""The command line: what goes to which stream, exit codes, Ctrl-C, and how quickly it starts."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra [cli]")
pytest.importorskip("rich", reason="the command line needs the extra [cli]")

from fake_decoder import FakeDecoder
from test_decoder import make
from typer.testing import CliRunner, Result

import qkernels
from qkernels._format import amount
from qkernels.cli import output
from qkernels.cli.app import app
from qkernels.cli.errors import BadInput, describe
from qkernels.cli.source import model_path
from qkernels.cli.traffic import kv_bytes

HERE = Path(__file__).resolve().parent
ANSWER = "Paris is the capital of France.\n"
CONTROL = re.compile(r"\x1b")
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(qkernels, "QuantDecoder", FakeDecoder, raising=False)
    monkeypatch.setattr(FakeDecoder, "calls", [])
    runner = CliRunner()
    return lambda *words, **kwargs: runner.invoke(app, [str(w) for w in words], **kwargs)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


def one_error_line(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("qkernels: ")
    assert "Traceback" not in result.stderr
    return lines[0]


# generate


def test_generate_writes_only_the_text_to_stdout(run: Run, model: Path) -> None:
    result = run("generate", model, "The capital of France is")
    assert (result.exit_code, result.stdout) == (0, ANSWER)
    for part in (
        "load ",
        "first token 0.25 s",
        "prompt 5 tokens at 20.0 tok/s",
        "decode 5 tokens at 8.0 tok/s",
    ):
        assert part in result.stderr
    # 96.6 MB of weights, and 5 + (6 + 1) // 2 tokens x 2 x 30 x 3 x 64 x 2 bytes of keys and
    # values, 8 times a second.
    kv = 8 * 2 * 30 * 3 * 64 * 2
    assert (
        f"{(96_600_000 + kv) * 8 / 1e6:.1f} MB/s (96.6 MB of weights + {kv / 1e3:.1f} kB of KV"
        in result.stderr
    )
    assert not CONTROL.search(result.output)


AUTO = {"spec": None, "device": "auto", "act": "auto", "dtype": "auto", "kv_dtype": "auto"}


def test_generate_passes_on_what_was_given_and_nothing_else(run: Run, model: Path) -> None:
    run("generate", model, "x")
    assert FakeDecoder.calls == [
        ("load", model, {**AUTO, "max_seq_len": None}),
        ("stream", "x", {"max_new_tokens": 256}),
    ]
    FakeDecoder.calls.clear()
    words = "--max-new-tokens 2 --temperature 0 --top-k 3 --top-p 0.5 --min-p 0.1"
    words += " --repetition-penalty 1.2 --seed 7"
    result = run(
        *("generate", model, "x", *words.split(), "--stop", "a", "--stop", "b"),
        *("--act", "float", "--kv-dtype", "int4", "--context", "64", "--device", "cuda:1"),
    )
    assert result.stdout == "Paris is\n"
    assert "ended by a length limit" in result.stderr
    sampling = {
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 7,
    }
    loading = {"act": "float", "kv_dtype": "int4", "device": "cuda:1"}
    assert FakeDecoder.calls == [
        ("load", model, {**AUTO, **loading, "max_seq_len": 64}),
        ("stream", "x", {"max_new_tokens": 2, "stop": ["a", "b"], **sampling}),
    ]


def test_generate_chat(run: Run, model: Path) -> None:
    assert run("generate", model, "Hi", "--chat").stdout == ANSWER
    assert FakeDecoder.calls[1][:2] == ("chat", [{"role": "user", "content": "Hi"}])


def test_generate_from_stdin(run: Run, model: Path) -> None:
    assert run("generate", model, "-", input="two\nlines\n\n").exit_code == 0
    assert FakeDecoder.calls[1][1] == "two\nlines\n"


def test_generate_spec(run: Run, model: Path) -> None:
    assert run("generate", model, "x", "--spec", "W4A16", "--group-size", "64").exit_code == 0
    options = FakeDecoder.calls[0][2]
    assert options["spec"] == qkernels.QuantSpec.from_scheme("W4A16", 64)
    assert options["act"] == "float"
    run("generate", model, "x", "--spec", "W4A8", "--act", "float")
    assert FakeDecoder.calls[2][2]["act"] == "float"


def test_no_second_newline(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_decoder.WORDS", "done\n")
    assert run("generate", model, "x").stdout == "done\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "{missing}", "x"], "no such file or directory"),
        (["generate", "nonesuch_package:a.gguf", "x"], "no Python package 'nonesuch_package'"),
        (["generate", "rich:a.gguf", "x"], "no such file; looked for"),
        (["generate", "typing:a.gguf", "x"], "typing is a module without a folder"),
        (["generate", "{model}", ""], "prompt: expected a text, got an empty one"),
        (["generate", "{model}", "w " * 40], "40 tokens do not fit the context of 32 tokens"),
        (["generate", "{broken}", "x"], "expected the magic GGUF, got b"),
        (["generate", "{model}", "x", "--act", "int3"], "int3"),
        (["generate", "{model}", "x", "--kv-dtype", "int5"], "int5"),
        (["generate", "{model}", "x", "--temperature", "-1"], "temperature"),
        (["generate", "{model}", "x", "--top-p", "1.5"], "top-p"),
        (["generate", "{model}", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (
            ["generate", "{model}", "x", "--group-size", "32"],
            "--group-size: only together with --spec",
        ),
        (["generate", "{model}", "x", "--spec", "W9A16"], "W9A16"),
        (["generate", "{model}", "x", "--spec", "W4A16", "--group-size", "7"], "group_size"),
        (["generate", "{model}"], "PROMPT"),
        (["generate", "{model}", "x", "--nonesuch"], "--nonesuch"),
        (["nonesuch"], "nonesuch"),
        (["eval", "{model}", "{missing}"], "No such file"),
        (["eval", "{model}", "{latin1}"], "not UTF-8"),
        (
            ["eval", "{model}", "{text}"],
            "need 256 tokens, but after the skipped beginning there are 9",
        ),
        (
            ["eval", "{model}", "{text}", "--window", "33", "--windows", "1"],
            "context of 32",
        ),
        (["chat", "{missing}"], "no such file or directory"),
        (["info", "{missing}"], "no such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, model: Path, tmp_path: Path, words: Sequence[str], message: str
) -> None:
    paths = {name: tmp_path / name for name in ("missing", "latin1", "text")}
    paths |= {"model": model, "broken": tmp_path / "a.broken"}
    paths["latin1"].write_bytes("caf\xe9".encode("latin-1"))
    paths["text"].write_text("ten chars.")
    paths["broken"].write_text("")
    given = [str(paths[w[1:-1]]) if w.startswith("{") else w for w in words]
    if "{text}" in words and "--window" not in words:
        given += ["--window", "32"]
    assert message in one_error_line(run(*given), 2)


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    result = run()
    assert result.exit_code == 2 and "generate" in result.output
    assert result.stderr == "" and isinstance(result.exception, SystemExit)


def test_a_bug_is_one_line_and_exit_code_1(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.bug"
    path.write_text("")
    line = one_error_line(run("generate", path, "x"), 1)
    assert "AssertionError: an assumption does not hold" in line
    assert "--debug" in line


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(run: Run, tmp_path: Path, place: str) -> None:
    path = tmp_path / "a.broken"
    path.write_text("")
    words = ["generate", path, "x"]
    result = run(*(["--debug", *words] if place == "before" else [*words, "--debug"]))
    assert isinstance(result.exception, BadInput)
    assert isinstance(result.exception.__cause__, ValueError)


# chat


def test_chat_keeps_the_conversation(run: Run, model: Path) -> None:
    result = run(
        "chat",
        model,
        "--system",
        "Be brief.",
        input="one\n\ntwo\n/reset\nthree\n/system\nfour\n/exit\nfive\n",
    )
    assert (result.exit_code, result.stdout) == (0, ANSWER * 4)
    system, answer = (
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": ANSWER.strip()},
    )

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    assert [call[1] for call in FakeDecoder.calls[1:]] == [
        [system, user("one")],
        [system, user("one"), answer, user("two")],
        [system, user("three")],
        [user("four")],
    ]


def test_chat_ends_with_its_input(run: Run, model: Path) -> None:
    result = run("chat", model, input="one")
    assert (result.exit_code, result.stdout) == (0, ANSWER)


def test_chat_help_and_unknown_commands(run: Run, model: Path) -> None:
    result = run("chat", model, input="/help\n/nonesuch\n")
    assert result.stderr.count("/reset ") == 2
    assert "no command /nonesuch" in result.stderr
    assert result.stdout == ""


def test_a_turn_that_does_not_fit_is_no_part_of_the_conversation(run: Run, model: Path) -> None:
    result = run("chat", model, input="w " * 40 + "\nshort\n")
    assert "40 tokens do not fit" in result.stderr
    assert (result.exit_code, result.stdout) == (0, ANSWER)
    assert FakeDecoder.calls[2][1] == [{"role": "user", "content": "short"}]


# eval


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("abcdefgh" * 20)
    return path


WINDOWS = ("--windows", "2", "--window", "16")


def table(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines()]


def test_eval_prints_the_perplexity(run: Run, model: Path, text: Path) -> None:
    result = run("eval", model, text, *WINDOWS)
    # All logits are equal, of a vocabulary of 100.
    assert table(result) == [["model", "perplexity"], ["tiny.gguf", "100.0000"]]
    assert "2 windows of 16 tokens, 30 predictions" in result.stderr
    assert "--against float compares" in result.stderr
    assert FakeDecoder.calls == [("load", model, {**AUTO, "max_seq_len": None})]


def test_eval_against_float_is_the_same_file(run: Run, model: Path, text: Path) -> None:
    result = run("eval", model, text, "--against", "float", "--kv-dtype", "int8", *WINDOWS)
    head, reference, row = table(result)
    assert head == ["model", "perplexity", "ratio", "+-", "kl_mean", "kl_p99", "kl_max", "top1_%"]
    assert reference == ["reference", "100.0000", *"------"]
    assert row == ["tiny.gguf", "100.0000", "1.00000", "0.00000", "0", "0", "0", "100.00"]
    assert [(path, o["act"], o["dtype"], o["kv_dtype"]) for _, path, o in FakeDecoder.calls] == [
        (model, "float", "float32", "float32"),
        (model, "auto", "auto", "int8"),
    ]
    assert "reference: the weights of MODEL as they are stored" in result.stderr


def test_eval_of_several_schemes(run: Run, model: Path, text: Path) -> None:
    words = ("--spec", "W4A16", "--spec", "W8A8:g128", "--group-size", "64")
    result = run("eval", model, text, *words, *WINDOWS)
    assert [row[0] for row in table(result)] == ["model", "reference", "W4A16", "W8A8:g128"]
    scheme = qkernels.QuantSpec.from_scheme
    assert [(o["spec"], o["act"]) for _, _, o in FakeDecoder.calls] == [
        (None, "float"),
        (scheme("W4A16", 64), "float"),
        (scheme("W8A8", 128), "int8"),
    ]


def test_eval_against_another_model(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    result = run("eval", model, text, "--against", other, *WINDOWS)
    assert [row[0] for row in table(result)] == ["model", "reference", "tiny.gguf"]
    assert [path for _, path, _ in FakeDecoder.calls] == [other, model]
    assert f"reference: {other}" in result.stderr


def test_eval_json(run: Run, model: Path, text: Path) -> None:
    result = run("eval", model, text, "--spec", "W4A16", "--json", *WINDOWS)
    assert result.exit_code == 0, result.output
    given = json.loads(result.stdout)
    assert (given["window"], given["windows"], given["predictions"]) == (16, 2, 30)
    reference, row = given["rows"]
    assert reference["name"] == "reference" and "kl_mean" not in reference
    assert (row["name"], row["kl_mean"], row["top1"], row["ratio"]) == ("W4A16", 0.0, 1.0, 1.0)
    assert row["perplexity"] == pytest.approx(100.0) and row["kv_dtype"] == "float16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spec", "W4A16:64"], "--spec: expected a scheme such as W4A16 or W8A8:g128, got"),
        (["--spec", "W4A16", "--spec", "W4A16"], "--spec: W4A16 stands there twice"),
        (["--spec", "W9A9"], "unknown scheme 'W9A9'"),
        (["--group-size", "64"], "--group-size: only together with --spec"),
        (["--against", "nowhere.gguf"], "no such file or directory"),
        (["--window", "33"], "a window of 33 tokens exceeds tiny.gguf's context of 32 tokens"),
        (["--window", "32"], "compare: 8 windows of 32 tokens need 256 tokens"),
        (["--window", "16", "--windows", "2", "--bos"], "the model's tokenizer names no BOS"),
    ],
)
def test_eval_refuses(run: Run, model: Path, text: Path, words: list[str], message: str) -> None:
    assert message in one_error_line(run("eval", model, text, *words), 2)


# sources, text, numbers


def test_info(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("info")
    assert result.exit_code == 0 and result.stdout == f"{qkernels.info()}\n"
    tiny = make()
    monkeypatch.setattr(FakeDecoder, "from_pretrained", lambda path, **options: tiny)
    result = run("info", model)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["activations", "int8"] in lines
    down = ["layers.*.down", "0-1", "linear_quant", "[64,", "96]"]
    assert [*down, "W4", "g32", "float16", "min", "int8", "cpu"] in lines
    assert sum(line[:1] == ["embed"] for line in lines) == 2  # the lookup and the tied head


def test_model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with:colon").mkdir()
    assert model_path(str(tmp_path / "with:colon")) == tmp_path / "with:colon"
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_path("some_package:model.gguf") == package / "model.gguf"


def test_describe() -> None:
    assert describe(KeyError("no tensor 'a'")) == "no tensor 'a'"
    assert (
        describe(FileNotFoundError(2, "No such file or directory", "/x"))
        == "/x: No such file or directory"
    )
    assert describe(ValueError("a\n  b")) == "a b"
    assert describe(ValueError()) == "ValueError"


def test_controls_do_not_reach_a_terminal() -> None:
    assert output.printable("a\x1b[2Jb\x9b\x07\tc\n") == "a\ufffd[2Jb\ufffd\ufffd\tc\n"


def test_amount() -> None:
    assert [amount(n) for n in (7, 1500, 96_600_000, 25.4e9)] == [
        "7 B",
        "1.5 kB",
        "96.6 MB",
        "25.40 GB",
    ]


def test_kv_bytes() -> None:
    assert kv_bytes("float16", 3, 64, (0, 0), 10) == 2 * 2 * 10 * 3 * 128
    assert kv_bytes("int8", 3, 64, (0, 4), 10) == 2 * (10 + 4) * 3 * (64 + 4)
    assert kv_bytes("int4", 1, 64, (0,), 1) == 2 * (32 + 4)
    assert kv_bytes("float32", 1, 64, (4,), 3) == 2 * 3 * 256


# processes


def start(*words: Any, env: dict[str, str] | None = None, **kwargs: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "fake_decoder.py"), *(str(w) for w in words)]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "TERM": "xterm-256color"} | (env or {})
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, env=env, preexec_fn=heed, **kwargs)


class Reader:
    """Reads a pipe or a pseudo-terminal up to texts that are expected."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held = b""

    def until(self, wanted: bytes, seconds: float = 60.0) -> bytes:
        """What comes up to and with `wanted`; fails after `seconds`, or at the end."""
        deadline = time.monotonic() + seconds
        while wanted not in self._held:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come within {seconds} s; got {self._held!r}"
            try:
                more = os.read(self._fd, 4096)
            except OSError:  # a pseudo-terminal whose other side was closed
                more = b""
            assert more, f"{wanted!r} did not come; got {self._held!r}"
            self._held += more
        at = self._held.index(wanted) + len(wanted)
        got, self._held = self._held[:at], self._held[at:]
        return got

    def rest(self) -> bytes:
        """What was read and not asked for yet."""
        return self._held


def test_pieces_arrive_one_by_one_and_ctrl_c_ends_with_130(model: Path) -> None:
    process = start(
        *("generate", model, "x"),
        env={"FAKE_PAUSE": "0.2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    reader = Reader(process.stdout.fileno())
    got = reader.until(b"Paris")
    assert (got, reader.rest()) == (
        b"Paris",
        b"",
    )  # pieces are flushed as they come: no more is decoded yet
    got += reader.until(b" is")
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    text = (got + reader.rest() + rest).decode()
    assert text.endswith("\n")
    assert ANSWER.startswith(text[:-1])
    assert text != ANSWER
    assert b"decode" in errors  # the numbers of what was decoded
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    assert b"\x1b" not in errors


def test_a_reader_that_goes_away(model: Path) -> None:
    process = start(
        *("generate", model, "x"),
        env={"FAKE_PAUSE": "0.05"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    Reader(process.stdout.fileno()).until(b"Paris")
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 141
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


def test_ctrl_c_in_a_chat_ends_the_answer_and_ctrl_d_the_program(model: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(
        *("chat", model),
        env={"FAKE_PAUSE": "0.3"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    reader = Reader(ours)
    try:
        reader.until(b"> ")
        os.write(ours, b"hello\n")
        reader.until(b"Paris is")
        process.send_signal(signal.SIGINT)
        reader.until(b"interrupted")
        reader.until(b"> ")
        # At the prompt: nothing but a new prompt. Python's input() misses a signal that comes
        # between its prompt and its wait for a key; a person would press again, and so does this.
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            if select.select([ours], [], [], 3.0)[0]:
                break
        reader.until(b"> ")
        os.write(ours, b"again\n")
        reader.until(b"first token")  # a whole answer, with its numbers
        reader.until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_terminal_gets_colours_and_a_progress_bar_and_no_foreign_controls(model: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(
        *("generate", model, "x"), env={"FAKE_TEXT": "red \x1b[31m"}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    reader = Reader(ours)
    try:
        got = reader.until(b"of KV per token")
        assert b"\x1b[" in got  # the dim numbers
        assert b"\x1b[31m" not in got
        assert "red \ufffd[31m".encode() in got
        assert b"loading tiny.gguf" in got
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_pipe_gets_the_text_as_it_is(model: Path) -> None:
    process = start(
        *("generate", model, "x"), env={"FAKE_TEXT": "red \x1b[31m"}, stdout=-1, stderr=-1
    )
    out, errors = process.communicate(timeout=30)
    assert out == b"red \x1b[31m\n"
    assert b"\x1b" not in errors


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"]])
def test_help_imports_neither_torch_nor_transformers(words: list[str]) -> None:
    code = (
        "import sys; sys.argv[0] = 'qkernels'\n"
        "from qkernels.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, cwd=HERE.parent
    )


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom qkernels.cli import main\nmain(['info'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 2
    assert "pip install 'qkernels[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
