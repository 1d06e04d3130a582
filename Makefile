# Everything is set up in .venv by the first command that needs it. On another torch: make demo TORCH=2.14.1
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: demo test lint format bench convex clean

demo: $(VENV)/.bench
	$(BIN)/python bench/train_lm.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(VENV)/.bench
	$(BIN)/python bench/bench_step.py

convex: $(VENV)/.bench
	$(BIN)/python bench/convex.py

clean:
	rm -rf $(VENV) build out *.egg-info pace_kernels/*.so

# torch first, since the extension is built against it; then the package, in place.
$(VENV)/.torch-$(TORCH): Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet "torch==$(TORCH)"
	rm -f $(VENV)/.torch-* && touch $@

$(VENV)/.bench: $(VENV)/.torch-$(TORCH) pyproject.toml setup.py $(CSRC)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@

$(VENV)/.test: $(VENV)/.bench
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@
