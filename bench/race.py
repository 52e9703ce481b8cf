"""Races llama.cpp on models of the sizes of Llama-3.2-1B and Llama-3.1-8B, with random blocks.

    python bench/race.py --model 8b --type Q4_K_M [--peer-python PYTHON] [--threads 2]

Writes the GGUF file (bench/random_gguf.py) unless --dir has the same one, then measures as
bench/peer_llama_cpp.py does. The 8B file takes 4.9 GB of disk, and both engines together twice that
in memory; --layers makes it shorter. Models with random weights choose between tokens that are
nearly as likely, so that greedy tokens part early in a race: how many agree is told, and nothing is
required of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peer_llama_cpp as peer
import random_gguf
import record
from workers import WorkerError


def default_folder() -> Path:
    """Where files are kept from one run to the next."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qkernels" / "race"


def file_name(model: random_gguf.RandomModel, kind: str, usual_layers: int) -> str:
    layers = "" if model.layers == usual_layers else f"-{model.layers}-layers"
    return f"random-{model.shapes.name}{layers}-{kind}.gguf".lower()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = sorted(random_gguf.MODELS)
    parser.add_argument("--model", nargs="+", choices=names, default=["1b"], metavar="MODEL")
    parser.add_argument("--type", nargs="+", choices=random_gguf.TYPES, default=["Q4_K_M"])
    parser.add_argument("--layers", type=int, help="of the model, if not all of them")
    parser.add_argument("--dir", type=Path, help=f"for the files; default: {default_folder()}")
    parser.add_argument("--keep", action="store_true", help="keep the files for the next run")
    parser.add_argument("--write-only", action="store_true", help="write the files and end")
    peer.add_options(parser)
    options = parser.parse_args()
    settings = peer.settings_of(options, parser)
    try:
        if not options.write_only:
            peer.require_peer(settings)  # before gigabytes are written
    except WorkerError as error:
        raise SystemExit(str(error)) from error
    folder = options.dir or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.model:
        whole = random_gguf.MODELS[name]
        try:
            model = random_gguf.with_layers(whole, options.layers)
        except ValueError as error:
            parser.error(str(error))
        for kind in options.type:
            path = folder / file_name(model, kind, whole.layers)
            was_there = path.exists()
            if not (was_there and random_gguf.is_current(path, model, kind)):
                why = " anew: it is damaged, or of other sizes or code" if was_there else ""
                print(f"writing {path}{why}", flush=True)
                random_gguf.write(path, model, kind)
            if options.write_only:
                continue
            try:
                body = peer.race(path, settings)
            except WorkerError as error:
                raise SystemExit(str(error)) from error
            finally:
                if not options.keep and not was_there:
                    path.unlink()
            body |= {"shapes": model.shapes.name, "layers": model.layers, "type": kind}
            if not options.no_write:
                result = f"race-{path.stem.removeprefix('random-')}"
                print(record.write(result, "race", settings.threads, body))


if __name__ == "__main__":
    main()
