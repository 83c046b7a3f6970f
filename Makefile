# `make` alone lists the targets. Needs Python 3.10 or newer and, for the fast kernels, a C++ compiler.

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO_IMAGE ?= examples/astronaut_256.png

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize quality pruning groups lottery search-study bench gpu-check lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{ printf "%-18s%s\n", $$1, $$2 }'

demo: $(INSTALLED)  ## restore a noisy photograph; the pictures go to demo/
	$(BIN)/sparse-gen denoise $(DEMO_IMAGE) --sigma 0.1 --seed 0 -o demo --overwrite
	@echo "The pictures are in $(CURDIR)/demo:"
	@ls demo/*.png

# A process a processor, and a file in one of them: so what its tests share is built once. Threads that spin while they
# wait take the processor from the other processes: 656 tests of two in over 300 s, and in 61 s where they sleep.
test: lint  ## run the tests
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses=8 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## check the sources
	$(BIN)/ruff check .

sanitize: $(INSTALLED)  ## run the C++ kernels under the address and undefined-behaviour sanitizers
	$(BIN)/pytest tests/test_sanitizers.py

quality: $(INSTALLED)  ## compare the methods' PSNR over three seeds
	$(BIN)/python bench/quality.py

pruning: $(INSTALLED)  ## compare the ways to find a mask; REDUCED=1 with one seed and fewer steps
	$(BIN)/python bench/pruning.py $(if $(REDUCED),--reduced)

search-study: $(INSTALLED)  ## compare constants of the mask search; REDUCED=1 at 128²
	$(BIN)/python bench/search_study.py $(if $(REDUCED),--reduced)

groups: $(INSTALLED)  ## weigh PSNR against step time of masks in groups; REDUCED=1 at 128² and with few steps
	$(BIN)/python bench/groups.py $(if $(REDUCED),--reduced)

lottery: $(INSTALLED)  ## compare lottery tickets with the dense prior; REDUCED=1 at 64² and with few steps
	$(BIN)/python bench/lottery.py $(if $(REDUCED),--reduced)

bench: $(INSTALLED)  ## measure speed; ONLY="training and 512" a part of it, SAVE=1 to store the figures
	$(BIN)/pytest bench/ $(if $(ONLY),-k "$(ONLY)") $(if $(SAVE),--save)

gpu-check: $(INSTALLED)  ## check and measure on this machine's GPU, into gpu-check/; PARTS="tests bench" ONLY=concrete_mask a part
	$(BIN)/python scripts/gpu_check.py gpu-check $(PARTS) $(if $(ONLY),--only "$(ONLY)")

# The stamp goes too: the library in the source tree has to be built again.
clean:  ## delete what was built, but not .venv and demo/
	rm -rf build dist *.egg-info $(INSTALLED) sparse_gen/_sparse_gen.so sparse_gen/_build.json
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "expected Python 3.10 or newer, got $(PYTHON) ($$($(PYTHON) --version 2>&1)); name another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: setup.py builds against the one that is installed.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@
