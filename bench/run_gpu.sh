#!/bin/bash
# Everything that needs a GPU, within nine minutes: the tests, the Triton kernels' tests,
# compute-sanitizer on small cases, the benchmarks. Each part has a limit of its own, no part goes on
# beyond the limit of all, and what it wrote until then is kept; the table of gates comes last. Run it in the root of the repository, where qkernels/_C_cpu.so and _C_cuda.so
# are built (FORCE_CUDA=1 python setup.py native). Nothing is installed.
#
#   OUT=folder PYTHON=python3 COMMIT=name bash bench/run_gpu.sh [tests] [triton] [sanitizer] [bench]
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-build/gpu-results}
PYTHON=${PYTHON:-python3}
PARTS=${*:-tests triton sanitizer bench}
ALL_SECONDS=${ALL_SECONDS:-530}
TEST_SECONDS=${TEST_SECONDS:-110}
TRITON_SECONDS=${TRITON_SECONDS:-110}
SANITIZER_SECONDS=${SANITIZER_SECONDS:-30} # each of three tools
BENCH_SECONDS=${BENCH_SECONDS:-215}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton-cache}
status=0

wants() { [[ " $PARTS " == *" $1 "* ]]; }
# part NAME SECONDS COMMAND...: into $OUT/NAME.log; says how it ended
part() {
  local name=$1 seconds=$2 start=$SECONDS code
  shift 2
  [[ $seconds -gt $((ALL_SECONDS - SECONDS)) ]] && seconds=$((ALL_SECONDS - SECONDS))
  if [[ $seconds -lt 1 ]]; then
    echo "== $name: no time left"
    status=1
    return 1
  fi
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  local how="exit $code"
  [[ $code == 0 ]] && how=ok
  [[ $code == 124 || $code == 137 ]] && how="out of time"
  [[ $code == 0 ]] || status=1
  echo "== $name: $how after $((SECONDS - start)) s"
  return $code
}

libraries=_C_cpu.so # Triton's kernels need no other
[[ " $PARTS " == " triton " ]] || libraries="_C_cpu.so _C_cuda.so"
for library in $libraries; do
  if [[ ! -f qkernels/$library ]]; then
    echo "run_gpu.sh: qkernels/$library is missing; build it by FORCE_CUDA=1 $PYTHON setup.py native" >&2
    exit 2
  fi
done
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>&1 | tail -4
part import 60 "$PYTHON" -c 'import torch, qkernels; print(qkernels.info())' || {
  tail -20 "$OUT/import.log"
  exit 2
}

if wants tests; then
  if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    part tests "$TEST_SECONDS" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --maxfail=20 tests
    tail -25 "$OUT/tests.log"
  else
    echo "== tests: $PYTHON has no pytest"
  fi
fi
if wants triton; then
  if "$PYTHON" -c 'import pytest, triton' 2>/dev/null; then
    # Compiling for other GPUs, and installing a package, is for the CPU's tests.
    part triton "$TRITON_SECONDS" "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=20 \
      --ignore=tests/test_triton_aot.py --deselect tests/test_triton_backend.py::test_the_walk_of_the_document \
      tests/test_triton_*.py
    tail -25 "$OUT/triton.log"
  else
    echo "== triton: $PYTHON has no pytest or no Triton"
  fi
fi
if wants sanitizer; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
  if [[ -n $sanitizer ]]; then
    for tool in memcheck racecheck synccheck; do
      part "$tool" "$SANITIZER_SECONDS" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        --print-limit 10 "$PYTHON" bench/small_gpu_cases.py
      tail -3 "$OUT/$tool.log"
    done
    # One file for the three: whoever fetches $OUT may be allowed few.
    cat "$OUT"/{memcheck,racecheck,synccheck}.log >"$OUT/sanitizer.log"
    rm -f "$OUT"/{memcheck,racecheck,synccheck}.log
  else
    echo "== sanitizer: compute-sanitizer is not here"
  fi
fi
if wants bench; then
  # The script stops by itself and prints its table; the outer limit is for a kernel that hangs.
  left=$((ALL_SECONDS - SECONDS - 25))
  [[ $BENCH_SECONDS -gt $left ]] && BENCH_SECONDS=$left
  part bench $((BENCH_SECONDS + 25)) "$PYTHON" bench/bench_gpu.py --out "$OUT" \
    --seconds "$BENCH_SECONDS" ${COMMIT:+--commit "$COMMIT"}
  sed -n '/^gate /,$p;/^FAILED/p' "$OUT/bench.log" | tail -40
  [[ -s $OUT/gpu.json ]] || tail -20 "$OUT/bench.log"
fi
exit $status
