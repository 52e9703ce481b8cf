"""Damages checkpoints at random and reads them, in a process of its own that has little memory and
little time: a crash, a hang or a large allocation ends that process, not the run of the tests.

    python tests/fuzz.py TARGET COUNT FOLDER [SEED]

prints {"cases": ..., "read": ...} as JSON, where "read" counts what was read in spite of its
damage. The files of the last case stay in FOLDER.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from gguf_writer import (
    TYPES,
    Tensor,
    Typed,
    bpe_tokenizer,
    random_blocks,
    write_gguf,
    write_llama,
)

from qkernels.checkpoints import CheckpointError, GGUFFile
from qkernels.checkpoints.gguf import StringArray
from qkernels.checkpoints.gguf_blocks import QUANTIZED

# What Python objects and numpy arrays may take per byte of the files, besides a fixed amount: a few
# objects per entry of a header, and the codes of 2-bit weights, which take a byte each.
ALLOCATION_FACTOR, ALLOCATION_FIXED = 40, 1 << 20
# Address space beyond what the process has after a first, undamaged case: torch's part.
ADDRESS_SPACE = 96 << 20
SECONDS = 20  # of one case, which takes milliseconds
EDGES = [
    *(0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 33, 255, 2**16),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
]


class Target:
    """Files of one kind in `folder`. `damage` writes them, damaged, and returns their size; `read`
    tells whether they could be read, having checked what came."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def whole(self) -> None:
        """Writes the files undamaged."""
        raise NotImplementedError

    def damage(self, rng: random.Random) -> int:
        raise NotImplementedError

    def read(self) -> bool:
        raise NotImplementedError


def damaged(raw: bytes, header: int, rng: random.Random, first: int = 0) -> bytes:
    """One to three damages to raw[first:header]: bits, bytes, whole numbers, parts removed,
    repeated or moved, or the end cut off."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind, at = rng.randrange(8), rng.randrange(first if rng.random() < 0.98 else 0, header)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind in (2, 3):
            data[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
        elif kind == 4:
            data[at : at + 4] = struct.pack("<I", rng.choice(EDGES) & 0xFFFFFFFF)
        elif kind == 5:
            del data[at : at + rng.choice((1, 2, 4, 8, 32))]
        elif kind == 6:
            data[at:at] = data[at : at + rng.choice((1, 4, 8, 24))]
        else:
            del data[at if rng.random() < 0.5 else rng.randrange(header, len(data) + 1) :]
        if len(data) <= header:
            break
    return bytes(data)


def read_gguf(path: Path) -> bool:
    """Whether the file opened; reads and packs all of it then, tolerating CheckpointError alone."""
    try:
        file = GGUFFile(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    with file:
        for key in file.metadata:
            try:
                value = file.metadata[key]
                if isinstance(value, StringArray):
                    list(value)
            except CheckpointError as error:
                assert str(path) in str(error)
        for name, info in file.tensors.items():
            try:
                if info.type not in QUANTIZED:
                    dense = file.dense(name)
                    assert tuple(dense.shape) == info.shape
                    dense.contiguous().view(torch.uint8).sum()
                    continue
                rows = 0
                for _, weight in file.plain_blocks(name, 64):
                    rows += weight.n
                    weight.pack()
                assert rows == math.prod(info.shape[:-1])
            except CheckpointError as error:
                assert str(path) in str(error)
    return True


class Gguf(Target):
    """The header of a file with every type of metadata and of tensors."""

    def whole(self) -> None:
        metadata = {
            "general.architecture": "llama",
            "general.alignment": 32,
            "a.float": 1.5,
            "a.flag": True,
            "a.string": "text",
            "a.strings": ["one", "", "three"],
            "a.ints": [1, -2, 3],
            "a.empty": Typed(9, [], 4),
            "a.bools": Typed(9, [0, 1], 7),
            "a.long": Typed(10, 2**40),
            "a.double": Typed(12, 0.25),
        }
        tensors = [Tensor("norm", "F32", (6,)), Tensor("half", "F16", (3, 5))]
        tensors += [
            Tensor(f"w.{kind}", kind, (2, 2, elements) if elements == 32 else (3, elements))
            for kind, (_, elements, _, _) in TYPES.items()
            if elements > 1
        ]
        self.path = write_gguf(self.folder / "x.gguf", metadata, tensors)
        self.raw = self.path.read_bytes()
        with GGUFFile(self.path) as file:
            self.header = file.tensors["norm"].offset

    def damage(self, rng: random.Random) -> int:
        return self.path.write_bytes(damaged(self.raw, self.header, rng, first=4))

    def read(self) -> bool:
        return read_gguf(self.path)


class GgufData(Target):
    """Any bytes as blocks: what is read must be what the `gguf` package makes of it, and finite."""

    def whole(self) -> None:
        self.write(random.Random(0), 0)

    def damage(self, rng: random.Random) -> int:
        return self.write(rng, rng.choice((1, 1, 3, 20)))

    def write(self, rng: random.Random, damages: int) -> int:
        self.kind = rng.choice(QUANTIZED)
        _, elements, size, _ = TYPES[self.kind]
        shape = (rng.randrange(1, 4), rng.randrange(1, 3) * elements)
        count = shape[0] * shape[1] // elements
        self.blocks = random_blocks(self.kind, count, np.random.default_rng(rng.getrandbits(32)))
        for _ in range(damages):
            at = rng.randrange(count), rng.randrange(size)
            self.blocks[at] = rng.choice((0, 1, 0x7C, 0x7F, 0x80, 0xFC, 0xFF, rng.randrange(256)))
        tensors = [Tensor("w", self.kind, shape, self.blocks.tobytes())]
        self.path = write_gguf(self.folder / "x.gguf", {}, tensors)
        return self.path.stat().st_size

    def read(self) -> bool:
        import gguf

        with GGUFFile(self.path) as file:
            try:
                blocks = [w.pack().unpack() for _, w in file.plain_blocks("w", 2)]
            except CheckpointError as error:
                assert str(self.path) in str(error) and "row" in str(error)
                return False
            number = gguf.GGMLQuantizationType[self.kind]
            raw = self.blocks.reshape(file.tensors["w"].shape[0], -1)
        want = torch.from_numpy(gguf.quants.dequantize(raw, number))
        got = torch.cat([weight.dequantize() for weight in blocks])
        assert got.isfinite().all()
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))
        return True


def check_decoder(path: Path) -> bool:
    """Whether a model loads; if so, that it runs. Errors must name the path."""
    from qkernels import QuantDecoder

    try:
        decoder = QuantDecoder.from_pretrained(path)
    except ValueError as error:  # CheckpointError and UnsupportedModelError are ValueErrors
        assert str(path) in str(error), f"does not name the checkpoint: {error}"
        assert len(str(error)) < 4000, f"a message of {len(str(error))} characters"
        return False
    assert decoder(torch.tensor([[1]])).logits.shape[:2] == (1, 1)
    return True


class GgufModel(Target):
    """The header of a model: sizes, options, tokenizer, names and shapes."""

    prefix = b"llama."

    def make(self) -> Path:
        return write_llama(self.folder / "x.gguf", layers=1, vocab=280, ffn=256)

    def whole(self) -> None:
        self.path = self.make()
        self.raw = self.path.read_bytes()
        with GGUFFile(self.path) as file:
            self.header = file.tensors["token_embd.weight"].offset
            keys = [key.encode() for key in file.metadata]
        # Most of the header is vocabulary, which other tests damage: look for the rest.
        options = [key for key in keys if key.startswith(self.prefix)]
        self.values = [self.raw.index(key) + len(key) for key in options]
        self.parts = [
            (4, self.raw.index(b"tokenizer.ggml.tokens")),
            (self.raw.index(b"token_embd.weight"), self.header),
            (4, self.header),
        ]

    def damage(self, rng: random.Random) -> int:
        if rng.random() < 0.4:  # a size or an option: its type is 4 bytes, its value too
            data, at = bytearray(self.raw), rng.choice(self.values)
            value = rng.choice(EDGES) & 0xFFFFFFFF if rng.random() < 0.8 else rng.getrandbits(32)
            data[at + 4 : at + 8] = struct.pack("<I", value)
            if rng.random() < 0.2:
                data[at] = rng.choice((4, 5, 6))
            return self.path.write_bytes(bytes(data))
        first, last = rng.choice(self.parts)
        return self.path.write_bytes(damaged(self.raw, last, rng, first))

    def read(self) -> bool:
        return check_decoder(self.path)


class GgufGemma(GgufModel):
    """The same of Gemma 3, with windows and two rotations."""

    prefix = b"gemma3."

    def make(self) -> Path:
        from qkernels.models import family_of_gguf

        options = {
            "block_count": 2,
            "context_length": 64,
            "embedding_length": 32,
            "feed_forward_length": 64,
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": Typed(9, [1, 0], 7),
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        }
        metadata = {"general.architecture": "gemma3"}
        metadata |= {f"gemma3.{key}": value for key, value in options.items()}
        family = family_of_gguf("gemma3")
        vocab = bpe_tokenizer(280)
        plain = {k: v.value if isinstance(v, Typed) else v for k, v in metadata.items()}
        config = family.from_gguf(plain, {"token_embd.weight": (280, 32)}, lambda _: ())
        tensors = [
            Tensor(d.gguf, "Q8_0" if d.is_matrix else "F32", d.shape)
            for d in sorted(family.weights(config), key=lambda d: d.gguf != "token_embd.weight")
        ]
        return write_gguf(self.folder / "x.gguf", {**metadata, **vocab}, tensors)


def run_fuzz(name: str, count: int, folder: Path) -> int:
    """Runs `count` cases in a process of its own; how many of them could be read. The process is
    held to the count, and to end well."""
    root = Path(__file__).resolve().parent
    path = os.pathsep.join([str(root.parent), str(root)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "QKERNELS_CACHE": "0"}
    command = [sys.executable, str(root / "fuzz.py"), name, str(count), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, f"exit status {run.returncode}; {run.stderr[-3000:]}"
    result = json.loads(run.stdout)
    assert result["cases"] == count
    return int(result["read"])


def limit_memory() -> None:
    """What is mapped now and ADDRESS_SPACE more; allocations beyond raise MemoryError, or end the
    process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))


def main(name: str, count: int, folder: Path, seed: int) -> None:
    # Imported here: fuzz_safetensors takes from this file.
    import fuzz_safetensors

    target: Target = {
        "gguf": Gguf,
        "gguf-data": GgufData,
        "gguf-model": GgufModel,
        "gguf-gemma": GgufGemma,
        "safetensors": fuzz_safetensors.Safetensors,
        "index": fuzz_safetensors.Index,
        "config": fuzz_safetensors.Config,
        "model": fuzz_safetensors.Model,
        "quantized": fuzz_safetensors.Quantized,
    }[name](folder)
    target.whole()
    assert target.read(), "the undamaged files cannot be read"
    limit_memory()
    rng, cases, read = random.Random(seed), 0, 0
    tracemalloc.start()  # sees Python's objects and numpy's buffers

    def peak_of_reading() -> tuple[bool, int]:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        signal.alarm(SECONDS)
        done = target.read()
        signal.alarm(0)
        return done, tracemalloc.get_traced_memory()[1] - before

    for case in range(count):
        size = target.damage(rng)
        allowed = ALLOCATION_FACTOR * size + ALLOCATION_FIXED
        try:
            done, peak = peak_of_reading()
            if peak >= allowed:  # not what is allocated once, by an import
                done, peak = peak_of_reading()
            assert peak < allowed, f"{peak} bytes for files of {size}"
        except BaseException:
            print(f"{name}: case {case} of seed {seed}", file=sys.stderr)
            raise
        read += done
        cases += 1
    print(json.dumps({"cases": cases, "read": read}))


if __name__ == "__main__":
    sys.modules["fuzz"] = sys.modules["__main__"]  # one copy of this file, not two
    _, name, count, folder, *rest = sys.argv
    main(name, int(count), Path(folder), int(rest[0]) if rest else 0)
