"""Options that choose kernels and threads, for bench_kernels.py and compare_revisions.py."""

from __future__ import annotations

import argparse

from qkernels import bench


def parser(doc: str | None) -> argparse.ArgumentParser:
    """--quick, --all, --model, --kernel, --m, --threads."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tiers = parser.add_mutually_exclusive_group()
    parser.set_defaults(tier=bench.STANDARD)
    tiers.add_argument("--quick", action="store_const", const=bench.QUICK, dest="tier")
    tiers.add_argument("--all", action="store_const", const=bench.FULL, dest="tier")
    parser.add_argument("--model", action="append", default=[], metavar="NAME")
    parser.add_argument("--kernel", metavar="REGEX", help="cases whose names have this in them")
    parser.add_argument("--m", type=int, action="append", default=[], help="rows of activations")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[bench.Case]:
    """The cases of these options. Ends with a usage error for what cannot be."""
    if options.threads < 1:
        parser.error(f"--threads must be positive, got {options.threads}")
    try:
        return bench.select(
            models=options.model, kernel=options.kernel, rows=options.m, tier=options.tier
        )
    except ValueError as error:
        parser.error(str(error))
