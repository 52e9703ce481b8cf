"""Mutation testing of the CUDA kernels: faults are put into the device code one at a time, and the
emulated tests must notice each.

    python tests/mutate_cuda.py norm                   every mutant of what test_cuda_norm.py tests
    python tests/mutate_cuda.py --share 0.2 --seed 1   of every family, a fifth of the mutants
    python tests/mutate_cuda.py --list norm            what would be done
    python tests/mutate_cuda.py --summary              what all runs together found

All mutants of a family are compiled at once, each behind a switch that reads one variable
(mutants.py finds them); a run forks a process per mutant, sets the variable and runs the family's
tests, those first that killed most mutants so far, until one fails. A mutant that crashes is killed
too, and one with which a test takes 8 times as long and 8 seconds more. Survivors are listed in
build/mutants/<family>.md; those that no test can notice belong into data/equivalent_mutants.toml
with the reason. A file that several families share is mutated in each, and what one of them notices
is noticed: the summary counts every mutant once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import tomllib
from mutants import Mutant, find_mutants, rewrite

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "mutants"
EQUIVALENT = ROOT / "tests" / "data" / "equivalent_mutants.toml"
PRELUDE = """#pragma once
namespace qk::emu {
// The mutant that runs; 0: none. Read by an instruction that the hooks do not see.
extern int mutant __attribute__((visibility("hidden")));
template <int kId>
__attribute__((always_inline)) inline int is_mutant() {
  int now;
  asm("movl %1, %0" : "=r"(now) : "m"(mutant));
  return now == kId;
}
template <int kId, class A, class B>
__attribute__((always_inline)) inline auto quotient(A a, B b) {
  if constexpr (requires { a % b; }) return is_mutant<kId>() ? a % b : a / b;
  else return is_mutant<kId>() ? a * b : a / b;
}
template <int kId, class A, class B>
__attribute__((always_inline)) inline auto rest(A a, B b) {
  return is_mutant<kId>() ? a / b : a % b;
}
}  // namespace qk::emu
#define QK_M(id) (::qk::emu::is_mutant<id>())
#define QK_SIGN(id) (1 - 2 * QK_M(id))
#define QK_ON(id) (1 - QK_M(id))
"""
VARIABLE = """#include "mutant.h"
namespace qk::emu {
int mutant = 0;
}
extern "C" __attribute__((visibility("default"))) void qk_set_mutant(int id) {
  qk::emu::mutant = id;
}
"""


@dataclass
class Result:
    mutant: Mutant
    verdict: str  # "killed", "crashed", "hung", "survived", "equivalent"
    test: str = ""
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        return self.verdict in ("killed", "crashed", "hung")


def families() -> list[str]:
    """Stems with kernels and emulated tests of their own."""
    stems = [path.stem[len("test_cuda_") :] for path in (ROOT / "tests").glob("test_cuda_*.py")]
    return sorted(stem for stem in stems if list((ROOT / "csrc" / "cuda").glob(f"{stem}*.cu")))


def headers(source: Path) -> set[Path]:
    """The .cuh files that a source includes, but for the instructions."""
    found: set[Path] = set()
    queue = [source]
    while queue:
        for name in re.findall(r'#include "([\w/.]+\.cuh)"', queue.pop().read_text()):
            header = ROOT / "csrc" / "cuda" / name
            if header.exists() and header.name != "ptx.cuh" and header not in found:
                found.add(header)
                queue.append(header)
    return found


def sources_of(family: str) -> tuple[list[Path], list[Path]]:
    """(the family's .cu files, all files whose device code they compile)."""
    units = sorted((ROOT / "csrc" / "cuda").glob(f"{family}*.cu"))
    others = [f for f in families() if f.startswith(family) and f != family]
    units = [u for u in units if not any(u.stem.startswith(other) for other in others)]
    included = set().union(*(headers(unit) for unit in units))
    return units, sorted({*units, *included})


def compile_command(include: str, extra: list[str]) -> list[str]:
    from test_build import setup_py

    torch = setup_py.Torch.find()
    flags = setup_py.emulation_flags(torch, OUT)
    command = [*setup_py.cxx(), *flags, "-isystem", str(torch.root / "include"), "-x", "c++"]
    hooks = setup_py.EMULATION_HOOKS.split()
    return [
        *command,
        *hooks,
        "-fwrapv",
        "-Wno-narrowing",
        "-Werror=vla",
        "-w",
        "-include",
        include,
        *extra,
    ]


def write_tree(tree: Path, mutants: list[Mutant]) -> dict[Path, list[tuple[int, int, int, int]]]:
    """The sources with every mutant behind its switch, and where in them each one is: (line, first
    column, last, id)."""
    shutil.copytree(ROOT / "csrc", tree / "csrc", dirs_exist_ok=True)
    (tree / "mutant.h").write_text(PRELUDE)
    (tree / "mutant.cpp").write_text(VARIABLE)
    where = {}
    for name in {mutant.file for mutant in mutants}:
        path = ROOT / "csrc" / "cuda" / name
        mine = [mutant for mutant in mutants if mutant.file == name]
        text, places = rewrite(path.read_text(), mine)
        (tree / "csrc" / "cuda" / name).write_text(text)
        where[tree / "csrc" / "cuda" / name] = places
    return where


ERROR = re.compile(r"^(\S+?):(\d+):(\d+): error", re.MULTILINE)
ANY_PLACE = re.compile(r"^(\S+?):(\d+):(\d+):", re.MULTILINE)


def build(family: str, mutants: list[Mutant]) -> tuple[Path, list[Mutant]]:
    """The family's library with all mutants that can be switched while it runs, and these: a
    mutant in a constant expression does not compile and is left out."""
    from test_build import setup_py

    tree = OUT / family
    shutil.rmtree(tree, ignore_errors=True)
    units, _ = sources_of(family)
    left = list(mutants)
    for attempt in range(20):
        where = write_tree(tree, left)
        command = compile_command(str(tree / "mutant.h"), ["-fsyntax-only"])
        files = [str(tree / "csrc" / "cuda" / unit.name) for unit in units]
        said = "".join(
            subprocess.run([*command, file], capture_output=True, text=True).stderr
            for file in files
        )
        if not ERROR.search(said):
            break
        bad: set[int] = set()
        for pattern in (ERROR, ANY_PLACE):
            for file, line, column in pattern.findall(said):
                near = [p for p in where.get(Path(file).resolve(), []) if p[0] == int(line)]
                at = int(column)
                near.sort(key=lambda p: max(p[1] - at, at - p[2], 0))
                bad.update(p[3] for p in (near if attempt > 8 else near[:1]))
            if bad:
                break
        if not bad:
            raise SystemExit(f"mutate_cuda: the mutated sources do not compile:\n{said[:4000]}")
        left = [mutant for mutant in left if mutant.id not in bad]
        print(f"{family}: {len(bad)} mutants are in constant expressions", flush=True)
    objects = []
    jobs = []
    for source in [*units, tree / "mutant.cpp"]:
        path = tree / "csrc" / "cuda" / source.name if source in units else source
        objects.append(str(tree / f"{source.stem}.o"))
        command = compile_command(str(tree / "mutant.h"), ["-c", str(path), "-o", objects[-1]])
        if source not in units:
            command = [part for part in command if not part.startswith("-fsanitize")]
        jobs.append(command)
    running: list[subprocess.Popen[bytes]] = []
    for command in jobs:
        if len(running) == 2 and running.pop(0).wait():
            raise SystemExit("mutate_cuda: compiling failed")
        running.append(subprocess.Popen(command))
    if any(process.wait() for process in running):
        raise SystemExit("mutate_cuda: compiling failed")
    # Other families' kernels as they are. Of an inline function that both have, the linker keeps
    # the first.
    rest = [
        o
        for o in sorted((ROOT / "build" / "emu").glob("*.o"))
        if o.name not in {Path(name).name for name in objects}
    ]
    torch = setup_py.Torch.find()
    library = tree / "_C_cuda_emu.so"
    command = [*setup_py.cxx(), "-shared", *objects, *map(str, rest), "-o", str(library)]
    command += ["-L", str(torch.root / "lib"), "-ltorch_cpu", "-ldl"]
    subprocess.run(command, check=True)
    return library, left


class Campaign:
    """A pytest plugin in whose place of running the tests every mutant runs them in a fork."""

    def __init__(self, library: Path, mutants: list[Mutant], workers: int) -> None:
        self.library, self.mutants, self.workers = library, mutants, workers
        self.results: list[Result] = []
        self.kills: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.failed = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        os.environ["QKERNELS_EMU_SOURCES"] = "0"
        items = list(session.items)
        start = time.monotonic()
        for i, item in enumerate(items):  # without a mutant: all pass, and how long each takes
            item.ihook.pytest_runtest_protocol(item=item, nextitem=items[(i + 1) % len(items)])
            if self.failed:
                raise SystemExit(f"mutate_cuda: {item.nodeid} fails without a mutant")
        whole = time.monotonic() - start
        print(
            f"\n{len(items)} tests pass in {whole:.1f} s; {len(self.mutants)} mutants", flush=True
        )
        waiting = iter(self.mutants)
        running: dict[int, tuple[int, Mutant, float]] = {}  # by pipe: pid, mutant, deadline
        while True:
            while len(running) < self.workers and (mutant := next(waiting, None)):
                pipe, pid = self.start(mutant, items)
                running[pipe] = (pid, mutant, time.monotonic() + 4 * whole + 20)
            if not running:
                return True
            self.collect(running)

    def start(self, mutant: Mutant, items: list[pytest.Item]) -> tuple[int, int]:
        here, there = os.pipe()
        pid = os.fork()
        if pid:
            os.close(there)
            return here, pid
        ctypes.CDLL(str(self.library)).qk_set_mutant(mutant.id)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        order = sorted(items, key=lambda i: (-self.kills[i.nodeid], self.seconds.get(i.nodeid, 0)))
        self.failed = False
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for i, item in enumerate(order):
            signal.alarm(round(8 + 8 * self.seconds.get(item.nodeid, 0)))  # then it hangs, and dies
            item.ihook.pytest_runtest_protocol(item=item, nextitem=order[(i + 1) % len(order)])
            if self.failed:
                os.write(there, f"killed {item.nodeid}".encode())
                os._exit(0)
        os.write(there, b"survived")
        os._exit(0)

    def collect(self, running: dict[int, tuple[int, Mutant, float]]) -> None:
        ready, _, _ = select.select(list(running), [], [], 1.0)
        for pipe in list(running):
            pid, mutant, deadline = running[pipe]
            late = time.monotonic() > deadline
            if pipe not in ready and not late:
                continue
            if pipe in ready:
                said = os.read(pipe, 4096).decode()
                verdict, _, test = (said or "crashed").partition(" ")
            else:
                os.kill(pid, signal.SIGKILL)
                verdict, test = "hung", ""
            os.waitpid(pid, 0)
            os.close(pipe)
            del running[pipe]
            self.kills[test] += 1
            self.results.append(Result(mutant, verdict, test))
            done = len(self.results)
            if verdict == "survived":
                print(f"{done}/{len(self.mutants)} survived: {mutant}", flush=True)
            elif done % 50 == 0:
                print(f"{done}/{len(self.mutants)}", flush=True)


def equivalent(mutant: Mutant) -> str | None:
    """Why no test can notice this mutant, if data/equivalent_mutants.toml says so."""
    for known in tomllib.loads(EQUIVALENT.read_text()).get("mutant", []):
        same = known["file"] == mutant.file and known["line"] == mutant.text
        if same and known.get("change", mutant.change) == mutant.change:
            return str(known["why"])
    return None


def described(mutant: Mutant) -> dict[str, object]:
    return {key: value for key, value in asdict(mutant).items() if key != "edits"}


def report(family: str, results: list[Result], skipped: list[Mutant]) -> str:
    tested = [r for r in results if r.verdict != "equivalent"]
    survivors = [r for r in tested if not r.killed]
    rate = 100 * (len(tested) - len(survivors)) / max(1, len(tested))
    counts = Counter(r.verdict for r in results)
    told = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    summary = f"{family}: {rate:.1f}% killed ({told}; {len(skipped)} in constant expressions)"
    lines = [f"# Mutants of {family}", "", summary, ""]
    lines += ["| where | change | line |", "|---|---|---|"] if survivors else []
    for r in survivors:
        text = r.mutant.text.replace("|", "\\|")
        change = r.mutant.change.replace("|", "\\|")
        lines.append(f"| {r.mutant.file}:{r.mutant.line} | {change} | `{text}` |")
    (OUT / f"{family}.md").write_text("\n".join(lines) + "\n")
    data = {
        "family": family,
        "rate": rate,
        "counts": counts,
        "skipped": len(skipped),
        "results": [
            {"verdict": r.verdict, "test": r.test} | described(r.mutant)
            for r in [*results, *(Result(m, "constant") for m in skipped)]
        ],
    }
    (OUT / f"{family}.json").write_text(json.dumps(data, indent=1) + "\n")
    return summary


def in_sample(mutant: Mutant, share: float, seed: int) -> bool:
    """The same choice in every family that shares the file."""
    return random.Random(f"{seed} {mutant.file} {mutant.place}").random() < share


def summary() -> str:
    """All runs so far, every mutant once: killed if one family's tests noticed it."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    order = ("killed", "crashed", "hung", "equivalent", "survived", "constant")
    for path in sorted(OUT.glob("*.json")):
        for result in json.loads(path.read_text())["results"]:
            key = (result["file"], result["place"])
            before = found.setdefault(key, result)
            if order.index(result["verdict"]) < order.index(before["verdict"]):
                found[key] = result
    rows = []
    totals: Counter[str] = Counter()
    for file in sorted({key[0] for key in found}):
        verdicts = Counter(r["verdict"] for key, r in found.items() if key[0] == file)
        totals.update(verdicts)
        rows.append(f"| {file} | {' | '.join(numbers(verdicts))} |")
    rows.append(f"| all | {' | '.join(numbers(totals))} |")
    head = "| file | killed | survived | equivalent | in constant expressions | rate |"
    lines = ["# Mutants of the CUDA kernels", "", head, "|---|" + "---:|" * 5, *rows, ""]
    lines += ["| survivor | change | line |", "|---|---|---|"]
    for key in sorted(found):
        r = found[key]
        if r["verdict"] == "survived":
            line = r["text"].replace("|", "\\|")
            change = r["change"].replace("|", "\\|")
            lines.append(f"| {r['file']}:{r['line']} | {change} | `{line}` |")
    (OUT / "summary.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines[2 : 4 + len(rows)])


def numbers(verdicts: Counter[str]) -> list[str]:
    killed = verdicts["killed"] + verdicts["crashed"] + verdicts["hung"]
    tested = killed + verdicts["survived"]
    rate = f"{100 * killed / tested:.1f}%" if tested else "-"
    rest = (verdicts[name] for name in ("survived", "equivalent", "constant"))
    return [str(killed), *map(str, rest), rate]


def run_family(family: str, options: argparse.Namespace) -> None:
    """In a process of its own: the library cannot be unloaded."""
    _, files = sources_of(family)
    mutants = find_mutants(files)
    if options.file:
        mutants = [m for m in mutants if m.file in options.file]
    if options.list:
        for mutant in mutants:
            print(mutant)
        return
    OUT.mkdir(parents=True, exist_ok=True)
    known = [Result(m, "equivalent", why) for m in mutants if (why := equivalent(m))]
    todo = [m for m in mutants if not equivalent(m)]
    todo = [m for m in todo if in_sample(m, options.share, options.seed)]
    print(f"{family}: compiling {len(todo)} mutants", flush=True)
    library, compiled = build(family, todo)
    skipped = [m for m in todo if m not in compiled]
    os.environ["QKERNELS_EMU_LIBRARY"] = str(library)
    campaign = Campaign(library, compiled, options.workers)
    tests = str(ROOT / "tests" / f"test_cuda_{family}.py")
    quiet = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist"]
    quiet += ["-p", "no:faulthandler"]
    pytest.main([tests, "-m", "not gpu", *quiet], plugins=[campaign])
    if len(campaign.results) != len(compiled):
        raise SystemExit(f"mutate_cuda: {family} was not run to its end")
    print(report(family, [*campaign.results, *known], skipped))


def chosen(options: argparse.Namespace) -> Iterator[str]:
    there = families()
    for family in options.family or there:
        if family not in there:
            raise SystemExit(f"mutate_cuda: no family {family!r}; there are {', '.join(there)}")
        yield family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("family", nargs="*", help="stems of test_cuda_<stem>.py; all if none")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants, by chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--file", nargs="*", help="of these files alone, e.g. norm.cuh")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--summary", action="store_true", help="of all runs so far, and end")
    options = parser.parse_args()
    if options.summary:
        print(summary())
        return
    names = list(chosen(options))
    if len(names) == 1:
        return run_family(names[0], options)
    for name in names:
        rest = [part for part in sys.argv[1:] if part not in names]
        subprocess.run([sys.executable, __file__, name, *rest], check=True)


if __name__ == "__main__":
    main()
