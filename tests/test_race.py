"""bench/race.py and bench/peer_llama_cpp.py: random models, the race itself, its figures."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qkernels as qk
from qkernels.checkpoints import GGUFFile
from qkernels.ops.rope import rope_table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import peer_llama_cpp as peer  # noqa: E402  its folder is no package
import race  # noqa: E402
import random_gguf  # noqa: E402
import workers  # noqa: E402
from footprint import Footprint, footprint, read_ceiling  # noqa: E402
from workers import Worker, WorkerError  # noqa: E402

TINY = random_gguf.MODELS["tiny"]


@pytest.fixture(scope="module", params=random_gguf.TYPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("race") / f"tiny-{request.param}.gguf"
    return random_gguf.write(path, TINY, request.param)


def test_weights_have_the_spread_of_a_model(tiny: Path) -> None:
    with GGUFFile(tiny) as file:
        for name, info in file.tensors.items():
            if len(info.shape) == 1:
                continue
            parts = [plain.dequantize() for _, plain in file.plain_blocks(name, 4096)]
            weight = torch.cat(parts)
            assert weight.isfinite().all(), name
            std, mean = weight.std().item(), weight.mean().item()
            expected = weight.shape[1] ** -0.5
            assert std == pytest.approx(expected, rel=0.05), name
            assert abs(mean) < 0.15 * expected, name  # groups of 32 have means of their own


def test_the_decoder_takes_it_and_stays_finite(tiny: Path) -> None:
    decoder = qk.QuantDecoder.from_pretrained(tiny, max_seq_len=128)
    config = decoder.config
    assert (config.layers, config.q_heads, config.kv_heads) == (2, 8, 2)
    assert config.vocab == 512
    logits = decoder(torch.arange(40)[None]).logits
    assert logits.isfinite().all()
    # Unit weights keep unit rows: the logits of a model whose scales are off by 10 would show it.
    assert 0.3 < logits.std().item() < 3.0


def test_other_readers_see_the_same(tiny: Path) -> None:
    """The file by the package gguf, which checks shapes and sizes against types."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(tiny)
    assert [int(n) for n in reader.tensors[0].shape] == [256, 512]  # columns first
    kind = tiny.stem.removeprefix("tiny-")
    file_type = reader.fields["general.file_type"].contents()
    assert gguf.LlamaFileType(file_type).name == f"MOSTLY_{kind}"


def test_q4_k_m_is_the_mix_of_llama_cpp() -> None:
    """Which of 32 and 16 layers have more bits, as published Q4_K_M files of these models show."""
    of_32 = [i for i in range(32) if random_gguf.more_bits(i, 32)]
    assert of_32 == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    of_16 = [i for i in range(16) if random_gguf.more_bits(i, 16)]
    assert of_16 == [0, 1, 4, 7, 10, 13, 14, 15]
    types = {t.name: t.type for t in random_gguf.plan(random_gguf.MODELS["8b"], "Q4_K_M")}
    for i in range(32):
        wide = "Q6_K" if i in of_32 else "Q4_K"
        assert types[f"blk.{i}.attn_v.weight"] == types[f"blk.{i}.ffn_down.weight"] == wide
        assert types[f"blk.{i}.attn_k.weight"] == types[f"blk.{i}.ffn_up.weight"] == "Q4_K"
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == "Q4_K"
    tied = {t.name: t.type for t in random_gguf.plan(random_gguf.MODELS["1b"], "Q4_0")}
    assert tied["token_embd.weight"] == "Q6_K" and "output.weight" not in tied


def test_sizes_are_those_of_the_models() -> None:
    """Published: Llama-3.1-8B Q4_K_M 4.92 GB and Llama-3.2-1B Q4_0 and Q4_K_M 0.77 and 0.81 GB,
    the tokenizer of some 8 MB included."""
    for name, kind, gigabytes in (
        ("8b", "Q4_K_M", 4.92),
        ("8b", "Q4_0", 4.66),
        ("1b", "Q4_K_M", 0.807),
        ("1b", "Q4_0", 0.773),
    ):
        nbytes = sum(t.nbytes for t in random_gguf.plan(random_gguf.MODELS[name], kind))
        assert nbytes / 1e9 == pytest.approx(gigabytes - 0.008, abs=0.01), (name, kind)


@pytest.mark.parametrize(("dim", "factor"), [(64, 32.0), (128, 8.0)])
def test_rope_factors_are_llama_3s(dim: int, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = rope_table(dim, 2, 500_000.0, {})
    scaled = rope_table(dim, 2, 500_000.0, scaling)
    # Row 1 of the table holds sines and cosines of the frequencies themselves.
    angle = np.arctan2(scaled[1, dim // 2 :].numpy(), scaled[1, : dim // 2].numpy())
    whole = np.arctan2(plain[1, dim // 2 :].numpy(), plain[1, : dim // 2].numpy())
    assert random_gguf.rope_factors(dim, factor) == pytest.approx(whole / angle, rel=1e-3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"Q4_0, Q4_K_M, got 'Q5_0'"):
        random_gguf.plan(TINY, "Q5_0")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        random_gguf.with_layers(TINY, 0)
    with pytest.raises(ValueError, match="at least 5 rounds, got 3"):
        peer.Settings(rounds=3)
    with pytest.raises(ValueError, match="at least 1025 tokens, got 512"):
        peer.Settings(prefill=(1024,), context=512)


def test_a_shorter_model_and_its_name() -> None:
    short = random_gguf.with_layers(random_gguf.MODELS["8b"], 4)
    assert race.file_name(short, "Q4_0", 32) == "random-llama-3.1-8b-4-layers-q4_0.gguf"
    assert sum(t.name.endswith("ffn_up.weight") for t in random_gguf.plan(short, "Q4_0")) == 4


def test_a_file_that_was_not_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(random_gguf.TensorPlan, "tiles", full)
    with pytest.raises(OSError, match="No space"):
        random_gguf.write(tmp_path / "m.gguf", TINY, "Q4_0")
    assert not list(tmp_path.iterdir())


def test_footprint_counts_what_a_token_reads(tiny: Path, tmp_path: Path) -> None:
    cost = footprint(tiny)
    with GGUFFile(tiny) as file:
        unread = ("token_embd.weight", "rope_freqs.weight")
        read = [info for name, info in file.tensors.items() if name not in unread]
    assert cost.weight_bytes == sum(info.nbytes for info in read)
    layer = 256 * 256 * 2 + 64 * 256 * 2 + 3 * 256 * 512
    assert (cost.layer_ops, cost.head_ops) == (2 * 2 * layer, 2 * 512 * 256)
    assert cost.ops(10, 1) == 10 * cost.layer_ops + cost.head_ops

    tied = random_gguf.RandomModel(TINY.shapes, 1, 8.0, True)
    path = random_gguf.write(tmp_path / "tied.gguf", tied, "Q4_0")
    both = footprint(path)
    with GGUFFile(path) as file:
        table = file.tensors["token_embd.weight"].nbytes
        rest = sum(info.nbytes for info in file.tensors.values()) - table
    assert both.weight_bytes == rest + table - 4 * 16  # all but 16 rope factors


def test_bandwidth_of_a_burst_does_not_count() -> None:
    assert read_ceiling([20.0, 31.0, 25.0])["read_ceiling_gb_per_s"] == 31.0
    found = read_ceiling([60.0, 40.0])
    assert found == {"read_gb_per_s": 60.0, "read_ceiling_gb_per_s": 45.0}


def test_rates_follow_from_the_median() -> None:
    cost = Footprint(weight_bytes=1_000_000_000, layer_ops=2_000, head_ops=500)
    prefill, decode = peer.plans(peer.Settings())
    assert (prefill.tokens, prefill.passes, decode.tokens) == (512, 1, 63)
    row = peer.rated(decode, [10.0, 20.0, 30.0], cost, 40.0)
    assert (row["median"], row["n"]) == (20.0, 3)
    assert row["gb_per_s"] == pytest.approx(20.0)  # 20 tokens/s of 1 GB
    assert row["percent_of_read"] == pytest.approx(50.0)
    row = peer.rated(prefill, [512.0] * 5, cost, 40.0)  # a pass per second
    assert row["gb_per_s"] == pytest.approx(1.0)
    assert row["gops"] == pytest.approx((512 * 2_000 + 500) / 1e9, abs=0.1)


class Timed:
    """An engine whose speed is known: `per_token` seconds."""

    def __init__(self, per_token: float, log: list[str], name: str) -> None:
        self.per_token, self.log, self.name = per_token, log, name

    def ask(self, **request: Any) -> dict[str, Any]:
        self.log.append(self.name)
        tokens = len(request["ids"]) if request["do"] == "prefill" else request["count"] - 1
        return {"seconds": tokens * self.per_token, "tokens": [1, 2, 3]}


def test_rounds_alternate_who_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.record, "read_bandwidth", lambda repeats: 30.0)
    log: list[str] = []
    workers = {peer.OURS: Timed(0.01, log, "a"), peer.PEER: Timed(0.02, log, "b")}
    settings = peer.Settings(pause=0.0, rounds=5, prefill=())
    found = peer.measure(workers, 100, Footprint(10**8, 1, 1), settings)
    assert "".join(log) == "baabbaabbaab"  # a round to warm up, then five
    (row,) = found["rows"]
    assert row["what"] == "decode 64" and row["ratio"] == pytest.approx(2.0)
    assert row["qkernels"]["n"] == row["llama_cpp"]["n"] == 5
    assert row["qkernels"]["percent_of_read"] == pytest.approx(33.3, abs=0.1)
    assert found["read_gb_per_s"] == 30.0


@pytest.fixture
def fake_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "fake_peer"))


def quick(**changes: Any) -> peer.Settings:
    usual = {"threads": 1, "rounds": 5, "prefill": (8,), "decode": 4, "context": 128, "pause": 0.0}
    return peer.Settings(**{**usual, **changes})


@pytest.mark.usefixtures("fake_peer")
def test_a_race_of_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.record, "read_bandwidth", lambda repeats: 30.0)
    path = random_gguf.write(tmp_path / "m.gguf", TINY, "Q4_K_M")
    body = peer.race(path, quick())
    assert [row["what"] for row in body["rows"]] == ["prefill 8", "decode 4"]
    assert body["engines"]["llama_cpp"]["llama-cpp-python"] == "0.0.fake"
    assert body["engines"]["qkernels"]["load_seconds"] > 0
    assert body["bytes_per_token"] == footprint(path).weight_bytes
    assert 0 <= body["greedy_tokens_in_common"] < 32  # the fake is no Llama
    for row in body["rows"]:
        assert row["ratio"] == pytest.approx(
            row["qkernels"]["median"] / row["llama_cpp"]["median"], abs=1e-3
        )
    json.dumps(body)


@pytest.mark.usefixtures("fake_peer")
def test_requantizing_is_the_peers_work(tmp_path: Path) -> None:
    path = random_gguf.write(tmp_path / "m.gguf", TINY, "Q4_K_M")
    copy = peer.requantized(path, "Q4_0", tmp_path, quick())
    assert copy.name == "m-requantized-Q4_0.gguf"
    assert copy.read_bytes() == path.read_bytes()
    with pytest.raises(WorkerError, match="no type 'Q9_9'"):
        peer.requantized(path, "Q9_9", tmp_path, quick())


@pytest.mark.usefixtures("fake_peer")
def test_a_peer_that_cannot_load_is_an_error_that_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "m.gguf"
    broken.write_bytes(b"nothing")
    with pytest.raises(WorkerError, match=r"llama\.cpp cannot load"):
        peer.start(peer.PEER, broken, quick())


def test_a_missing_peer_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not built')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "models"
    monkeypatch.setattr(sys, "argv", ["race.py", "--model", "tiny", "--dir", str(folder)])
    with pytest.raises(SystemExit, match=r"ImportError: not built.*pip install numpy llama-cpp"):
        race.main()
    assert not folder.exists()
    with pytest.raises(WorkerError, match="nowhere/python: No such file"):
        peer.require_peer(quick(peer_python="nowhere/python"))


def test_a_worker_that_ends_between_requests_is_told() -> None:
    code = "import sys; print('{}', flush=True); sys.exit('gone for good')"
    worker = Worker([sys.executable, "-c", code])
    with pytest.raises(WorkerError, match="gone for good"):
        worker.ask(do="anything")
    worker.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that workers start."""
    processes: list[Any] = []
    real = workers.subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> Any:
        processes.append(real(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    return processes


def test_a_worker_whose_hello_is_none_leaves_no_process(started: list[Any]) -> None:
    code = "import sys, time; print('lost', file=sys.stderr); print('hi', flush=True)"
    with pytest.raises(WorkerError, match=r"answered 'hi\\n', no JSON:\nlost"):
        Worker([sys.executable, "-c", f"{code}; time.sleep(60)"])
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_an_interrupted_start_leaves_no_process(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Worker) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Worker([sys.executable, "-c", "import time; time.sleep(60)"])
    assert [process.poll() for process in started] == [-signal.SIGKILL]


@pytest.mark.usefixtures("fake_peer")
def test_the_command_writes_a_file_races_and_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer.record, "read_bandwidth", lambda repeats: 30.0)
    written: list[Any] = []
    monkeypatch.setattr(peer.record, "write", lambda *given: written.append(given))
    run = ["race.py", "--model", "tiny", "--dir", str(tmp_path), "--pause", "0", "--threads", "1"]
    run += ["--rounds", "5", "--prefill", "8", "--decode", "4"]
    monkeypatch.setattr(sys, "argv", run)
    race.main()
    out = capsys.readouterr().out
    assert "greedy tokens agree for" in out and "decode 4: qkernels" in out
    ((name, kind, threads, body),) = written
    assert (name, kind, threads) == ("race-llama-tiny-q4_k_m", "race", 1)
    assert (body["shapes"], body["layers"], body["type"]) == ("Llama-tiny", 2, "Q4_K_M")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", [*run, "--keep", "--write-only"])
    race.main()
    assert [p.name for p in tmp_path.iterdir()] == ["random-llama-tiny-q4_k_m.gguf"]


def test_only_the_file_that_would_be_written_now_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["race.py", "--model", "tiny", "--type", "Q4_0", "--dir", str(tmp_path), "--write-only"]
    monkeypatch.setattr(sys, "argv", run)
    race.main()
    path = tmp_path / "random-llama-tiny-q4_0.gguf"
    right, written = path.read_bytes(), f"writing {path}"
    assert capsys.readouterr().out == f"{written}\n"
    race.main()
    assert capsys.readouterr().out == ""

    random_gguf.write(path, TINY, "Q4_K_M")
    other_type = path.read_bytes()
    random_gguf.write(path, TINY, "Q4_0", seed=1)
    other_seed = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(random_gguf, "_ROPE_BASE", 10_000.0)
        random_gguf.write(path, TINY, "Q4_0")
    stale = [other_type, other_seed, path.read_bytes(), right[:-4096], b"no GGUF"]
    for content in stale:
        path.write_bytes(content)
        race.main()
        assert capsys.readouterr().out.startswith(f"{written} anew: it is damaged")
        assert path.read_bytes() == right


def test_a_file_of_an_older_format_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_gguf.write(tmp_path / "m.gguf", TINY, "Q4_0")
    assert random_gguf.is_current(path, TINY, "Q4_0")
    assert not random_gguf.is_current(path, random_gguf.with_layers(TINY, 3), "Q4_0")
    monkeypatch.setattr(random_gguf, "FORMAT", random_gguf.FORMAT + 1)
    assert not random_gguf.is_current(path, TINY, "Q4_0")
