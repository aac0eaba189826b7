# Everything a checkout can do. `make demo` and `make test` need only Python >= 3.11, make and git:
# the environment in .venv is made, and added to when pyproject.toml or constraints.txt changed.

# The interpreter that makes .venv: `make demo PYTHON=python3.12` picks another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Extra arguments: `make test ARGS='-k spans -x'`, `make demo ARGS='--tokens 2048 --json'`.
ARGS ?=

# Tests run side by side, a worker for each core and each file in one of them; `make test ARGS='-n 0'` starts none.
WORKERS ?= -n logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test browser docs lint format bench figures gpu gpu-test gpu-bench gpu-tune gpu-dry dist clean

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: $(DEMO)  ## run the main job: packed documents, forward, backward, every check; files in maskflash-demo/
	$(BIN)/python -m maskflash demo $(ARGS)

test: $(STAMP) browser  ## run all tests
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

browser:  ## have Chromium for the explorer's tests, from Debian's packages where root may install them
	@sh tests/visualize/install_chromium.sh

docs: $(STAMP)  ## build the docs as a site into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "open site/index.html, or to search it: $(BIN)/python -m http.server --directory site"

lint: $(STAMP)  ## ruff (rules and format) and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## run the CPU benchmarks and print their tables
	$(BIN)/python -m benchmarks.attention --cpu $(ARGS)
	$(BIN)/python -m benchmarks.analysis $(ARGS)
	$(BIN)/python -m benchmarks.flashmask $(ARGS)
	$(BIN)/python -m benchmarks.overhead $(ARGS)
	$(BIN)/python -m benchmarks.flex $(ARGS)
	$(BIN)/python -m benchmarks.scores $(ARGS)
	$(BIN)/python -m benchmarks.decode $(ARGS)
	$(BIN)/python -m benchmarks.forms $(ARGS)
	$(BIN)/python -m benchmarks.parallel $(ARGS)
	$(BIN)/python -m benchmarks.train_packed $(ARGS)

figures: $(STAMP)  ## run them, store the results and write the docs' tables
	$(BIN)/python -m benchmarks.attention --cpu --json benchmarks/results/cpu/attention.json $(ARGS)
	$(BIN)/python -m benchmarks.analysis --json benchmarks/results/cpu/analysis.json $(ARGS)
	$(BIN)/python -m benchmarks.analysis --million --json benchmarks/results/cpu/million.json $(ARGS)
	$(BIN)/python -m benchmarks.flashmask --json benchmarks/results/cpu/flashmask.json $(ARGS)
	$(BIN)/python -m benchmarks.flashmask --analysis --json benchmarks/results/cpu/flashmask_analysis.json $(ARGS)
	$(BIN)/python -m benchmarks.overhead --json benchmarks/results/cpu/overhead.json $(ARGS)
	$(BIN)/python -m benchmarks.flex --json benchmarks/results/cpu/flex.json $(ARGS)
	$(BIN)/python -m benchmarks.scores --json benchmarks/results/cpu/scores.json $(ARGS)
	$(BIN)/python -m benchmarks.decode --json benchmarks/results/cpu/decode.json $(ARGS)
	$(BIN)/python -m benchmarks.forms --json benchmarks/results/cpu/forms.json $(ARGS)
	$(BIN)/python -m benchmarks.parallel --json benchmarks/results/cpu/parallel.json $(ARGS)
	$(BIN)/python -m benchmarks.train_packed --json benchmarks/results/cpu/train_packed.json $(ARGS)
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU, with the Python that has torch and triton there: no .venv, no network. Each of the three ends
# by itself after GPU_SECONDS, and writes what it finds at once into a folder of GPU_RESULTS, named after the device.
# Without git's history `make gpu COMMIT=abc1234` says what is measured. ARGS go to gpu-bench: --tokens, --dim.
GPU_PYTHON ?= python3
GPU_RESULTS ?= benchmarks/results
GPU_SECONDS ?= 220
GPU_WORDS = --folder $(GPU_RESULTS) --seconds $(GPU_SECONDS)
export COMMIT

gpu:  ## on a GPU: the kernels' tests and a memory checker, speed beside FlexAttention and SDPA, tiles and cold starts
	$(MAKE) --keep-going gpu-test gpu-bench gpu-tune

gpu-test:
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu_test $(GPU_WORDS)

gpu-bench:
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu $(GPU_WORDS) $(ARGS)

gpu-tune:
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu_tune $(GPU_WORDS)

# The same three small, on the CPU: do the scripts work? Kernels are interpreted.
gpu-dry: export TRITON_INTERPRET = 1
gpu-dry: $(STAMP)
	for script in gpu_test gpu gpu_tune; do \
		PYTHONPATH=. $(BIN)/python -m benchmarks.$$script --dry --folder build/gpu-dry || exit 1; done

dist: $(STAMP)  ## build the sdist, and the wheel from it, into dist
	$(BIN)/python -m build --no-isolation

clean:  ## remove caches and build results, keep .venv
	rm -rf build dist site maskflash-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find maskflash tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and pinned: left to a dependency's lower bound, pip may fetch a newer one with gigabytes of
# CUDA. The build back-end comes from the same pins, so the editable install builds without isolation. The demo needs
# neither triton nor what tests and docs need.
$(DEMO): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "maskflash needs Python >= 3.11 with venv; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing torch and maskflash into $(VENV): once, and it takes as long as the download of torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch hatchling editables
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[plot]'
	@touch $@

$(STAMP): $(DEMO)
	@echo "installing what tests, docs and kernels need into $(VENV): once"
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@
