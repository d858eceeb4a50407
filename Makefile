# modeltc_lab: `make lab` opens the workbench, `make test` runs everything `.ci/run` runs.
# Needs Python 3.11 or 3.12, and make. Everything else is installed into .venv; nothing that is there is installed again.

SHELL := bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PORT ?= 8888
BROWSER ?=
LOCK := .ci/constraints.txt
# CPU builds of torch come from here; `make lab TORCH_INDEX=` takes the default build instead, which on Linux is CUDA's.
# The choice is kept in .venv: the next `make test` leaves it, saying TORCH_INDEX again changes it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_SAID := $(filter-out file default undefined,$(origin TORCH_INDEX))
PINS := $(VENV)/constraints.txt
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
GPU_PYTHON ?= python3

.PHONY: help lab test docs gpu peers nightly kernels browser lint export figures clean FORCE
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

$(VENV)/.made:
	@[ -n "$(PYTHON)" ] || { echo "make: no Python 3.11 or 3.12 found; install one, or say make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Where torch is to come from: written anew only when another place was asked for.
$(VENV)/.index: $(VENV)/.made FORCE
	@[ -f $@ ] && { [ -z "$(TORCH_SAID)" ] || [ "$$(cat $@)" = "$(TORCH_INDEX)" ]; } || echo "$(TORCH_INDEX)" > $@

# torch first and alone: only this package comes from TORCH_INDEX, and a closed network falls back to the default index.
# A CUDA build names the triton it needs; only then the lock's triton gives way.
$(VENV)/.torch: $(VENV)/.index $(LOCK)
	@want=$$(grep -E '^torch==' $(LOCK)); index=$$(cat $(VENV)/.index); again=; [ $(VENV)/.index -nt $@ ] && again=--force-reinstall; \
	{ [ -z "$$again" ] && $(PY) -c "import importlib.metadata as m; raise SystemExit('torch==' + m.version('torch').split('+')[0] != '$$want')" 2>/dev/null; } || \
		{ [ -n "$$index" ] && $(PIP) --no-deps $$again --retries 0 --timeout 20 --index-url $$index $$want 2>/dev/null; } || { \
			echo "$$want: taken from the default package index"; $(PIP) --no-deps $$again $$want; }
	@if $(PY) -c "import importlib.metadata as m; raise SystemExit(not any(r.startswith('triton') for r in m.requires('torch') or ()))"; \
		then grep -v '^triton==' $(LOCK) > $(PINS); else cp $(LOCK) $(PINS); fi
	@touch $@

$(VENV)/.lab: $(VENV)/.torch pyproject.toml $(LOCK)
	$(PIP) -c $(PINS) -e '.[lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(LOCK)
	$(PIP) -c $(PINS) -e '.[dev]'
	@touch $@ $(VENV)/.lab

lab: $(VENV)/.lab  ## install and open JupyterLab on nbs/index.ipynb (PORT=8888, BROWSER=none for a server)
	@echo "JupyterLab: http://127.0.0.1:$(PORT)/lab/tree/index.ipynb"
	cd nbs && JUPYTER_CONFIG_PATH='$(CURDIR)/.ci/jupyter' exec ../$(BIN)/jupyter lab index.ipynb --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT) \
		$(if $(filter none,$(BROWSER)),--no-browser) $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

test: $(VENV)/.dev  ## everything: lint, export check, tests, notebooks, site, browser, wheel; prints the counts
	$(PY) tests/run_all.py

docs: $(VENV)/.dev  ## run the notebooks and build the site into docs/_site
	$(PY) docs/execute.py
	$(PY) docs/build.py

export: $(VENV)/.dev  ## notebooks to modules, and clean notebooks
	cd $(CURDIR) && $(BIN)/nbdev-export && $(BIN)/nbdev-clean

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/mypy

kernels: $(VENV)/.dev  ## compile every kernel for sm_90 (no GPU needed) and show registers, spills and shared memory
	$(PY) kernels/bench/compile_check.py

gpu:  ## on a machine with a GPU: kernel tests, then benchmarks, records into docs/results (GPU_PYTHON=python3)
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m pytest tests/kernels tests/decoding/test_device.py -q --import-mode=importlib -p no:cacheprovider
	PYTHONPATH=.:kernels $(GPU_PYTHON) kernels/bench/bench_paged_decode.py
	PYTHONPATH=.:kernels $(GPU_PYTHON) kernels/bench/bench_constrained.py
	PYTHONPATH=.:kernels $(GPU_PYTHON) kernels/bench/bench_varlen_attention.py

peers: $(VENV)/.dev  ## the contracts with an older transformers and with vLLM's scheduler and structured outputs, each in an environment of its own (fetches vLLM, a third of a gigabyte)
	PYTHON=$(PY) bash tests/peers/transformers_versions.sh
	PYTHON=$(PY) bash tests/peers/vllm_scheduler.sh
	PYTHON=$(PY) bash tests/peers/vllm_structured.sh

nightly: $(VENV)/.dev  ## the differential suites at full size: every mask against brute force and the peers, every schema; records into build/nightly
	for e in exactness schema_coverage schema_coverage_peers; do $(BIN)/modeltc-lab run decoding/$$e --full --results build/nightly || exit 1; done

browser: docs  ## the tests that drive a real browser
	$(PY) -m pytest tests/browser -q

figures: $(VENV)/.dev  ## measure again: every experiment's records
	for e in $$($(BIN)/modeltc-lab run); do $(BIN)/modeltc-lab run $$e || exit 1; done

clean:  ## remove what was built (not .venv)
	rm -rf build dist docs/_build docs/_site _proc .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
