"""The working tree against another revision, kernel by kernel.

    python bench/compare_revisions.py REV [--quick | --all] [--model NAME ...] [--kernel REGEX]
        [--m M ...] [--threads 2] [--rounds 9] [--json FILE]

REV is checked out as a git worktree under build/revisions and built there. Two processes, one per
tree, hold the same case with the same inputs; the one that is not measured sleeps. Samples are
taken in turns, in the other order every other round. A case's figure is the median over the rounds
of time(REV) / time(working tree): above 1, the working tree is faster. The cases and the inputs are
those of the working tree, in both processes; only the kernels differ.

A case that one of the trees fails, or whose result is wrong there, is reported and does not end the
run; the exit code is 1 then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REVISIONS = ROOT / "build" / "revisions"
_READY = "worker-ready"


def git(*words: str) -> str:
    return subprocess.check_output(["git", "-C", str(ROOT), *words], text=True).strip()


def checkout(revision: str) -> Path:
    """A worktree of the revision with its libraries built. Raises SystemExit."""
    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except subprocess.CalledProcessError:
        raise SystemExit(f"compare_revisions: {revision!r} is not a revision of {ROOT}") from None
    tree = REVISIONS / commit[:12]
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    build = subprocess.run([sys.executable, "setup.py", "native"], cwd=tree)
    if build.returncode:
        raise SystemExit(f"compare_revisions: {revision} does not build ({tree})")
    return tree


def use_this_benchmark() -> None:
    """Makes `qkernels.bench` this tree's, whatever tree `qkernels` itself comes from."""
    import qkernels  # noqa: F401

    folder = ROOT / "qkernels" / "bench"
    spec = importlib.util.spec_from_file_location(
        "qkernels.bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qkernels.bench"] = module
    spec.loader.exec_module(module)


def worker(threads: int, seconds: float) -> None:
    """Answers lines of stdin: a name of a case prepares it, an empty line takes a sample."""
    import torch

    use_this_benchmark()
    from qkernels.bench.cases import every_case
    from qkernels.bench.suite import build, default_rotation
    from qkernels.bench.timing import Timer

    torch.set_num_threads(threads)
    cases = {case.name: case for case in every_case()}
    print(json.dumps(_READY), flush=True)
    timer = None
    with torch.inference_mode():
        for line in sys.stdin:
            name = json.loads(line)
            try:
                if name is not None:
                    timer = None  # first: two cases may not fit into memory
                    problem = build(cases[name], default_rotation())
                    problem.check()
                    timer = Timer(problem.ours, seconds)
                    answer: Any = {}
                else:
                    assert timer is not None
                    answer = {"us": timer.sample()}
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


class Worker:
    """A process that runs the kernels of one tree."""

    def __init__(self, tree: Path, threads: int, seconds: float) -> None:
        command = [sys.executable, __file__, "--worker", str(threads), str(seconds)]
        self._process = subprocess.Popen(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._read() != _READY:
            raise SystemExit(f"compare_revisions: the process of {tree} did not start")

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}

    def ask(self, name: str | None) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(name) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process ended"}
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def compare(workers: dict[str, Any], name: str, rounds: int) -> dict[str, Any]:
    """One case. workers: "old" and "new" -> what has `ask`."""
    for side, each in workers.items():
        if "error" in (answer := each.ask(name)):
            return {"name": name, "error": f"{side}: {answer['error']}"}
    samples: dict[str, list[float]] = {side: [] for side in workers}
    order = list(workers)
    for _ in range(rounds):
        for side in order:
            answer = workers[side].ask(None)
            if "error" in answer:
                return {"name": name, "error": f"{side}: {answer['error']}"}
            samples[side].append(answer["us"])
        order.reverse()
    ratios = [old / new for old, new in zip(samples["old"], samples["new"], strict=True)]
    medians = {f"{side}_us": round(median(values), 3) for side, values in samples.items()}
    spread = {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"name": name, **medians, **{key: round(v, 4) for key, v in spread.items()}}


def line_of(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    slower = " (slower)" if row["ratio"] < 1 else ""
    return (
        f"{row['name']}: {row['old_us']:.1f} -> {row['new_us']:.1f} us, {row['ratio']:.3f}x "
        f"({row['least']:.3f} to {row['most']:.3f}){slower}"
    )


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), float(sys.argv[3]))
        return 0
    sys.path.insert(0, str(ROOT))
    import selection

    from qkernels.bench.machine import provenance

    parser = selection.parser(__doc__)
    parser.add_argument("revision", metavar="REV")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.03, help="of one sample")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    cases = selection.chosen(parser, options)
    if options.rounds < 5:
        parser.error(f"a median needs at least 5 rounds, got {options.rounds}")
    trees = {"old": checkout(options.revision), "new": ROOT}
    workers = {side: Worker(tree, options.threads, options.seconds) for side, tree in trees.items()}
    rows = []
    for case in cases:
        rows.append(compare(workers, case.name, options.rounds))
        print(line_of(rows[-1]), flush=True)
    for each in workers.values():
        each.close()
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    failed = len(rows) - len(ratios)
    if ratios:
        print(f"median of {len(ratios)} cases: {median(ratios):.3f}x; {failed} failed")
    if options.json is not None:
        body = {"revision": options.revision, **provenance(options.threads), "rows": rows}
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
