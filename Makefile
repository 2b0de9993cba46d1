# Targets are Python commands; this file only finds the interpreter and installs what they need.
# Without make (Windows): see README.md for the same commands in PowerShell.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export MINGLM_PROMPT := $(value PROMPT)# as it was given, but for leading spaces, which make drops
PY     := $(BIN)/python

help:            ## print this help
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 14

setup: $(VENV)/.dev  ## make .venv and install minglm with its test and lint tools

demo: $(VENV)/.ready  ## take a prompt through the model, step by step:  make demo PROMPT="for i in range("
	@$(PY) -m minglm demo $${MINGLM_PROMPT:+"$$MINGLM_PROMPT"}
	@echo 'To go on: source $(BIN)/activate, then minglm --help'

test: $(VENV)/.test  ## the fast tests: no torch, no network
	@$(PY) -m pytest -n 2

check-all: lint types parity browser docs $(VENV)/.notebooks  ## everything: lint, types, parity, slow tests, tests without the JIT, notebooks, docs
	$(PY) -m pytest -n 2 -m "slow or not slow"
	$(PY) notebooks/build.py --execute
	NUMBA_DISABLE_JIT=1 $(PY) -m pytest -n 2

parity: $(VENV)/.parity  ## compare with transformers and torch (installs both), print the table
	$(PY) -m pytest tests/parity

browser: $(VENV)/.browser  ## the trace page in the Chromium of this machine (installs a driver; skips where there is none)
	$(PY) -m pytest -n 2 tests/browser

elsewhere: $(VENV)/.bench  ## our exports in transformers and llama.cpp (installs both, builds llama.cpp: ten minutes and more)
	$(PY) -m pytest tests/parity/test_elsewhere.py

soak: $(VENV)/.test  ## long runs: drafts on a thousand prompts, a hundred thousand damaged files; an hour
	$(PY) -m pytest tests/soak

lint: $(VENV)/.dev  ## ruff: lint and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(PY) -m mypy

notebooks: $(VENV)/.notebooks  ## execute the notebooks whose sources changed, and write them
	$(PY) notebooks/build.py

docs: $(VENV)/.docs  ## the site in out/docs: pages, notebooks as they were executed, API reference; a warning is an error
	$(PY) -m sphinx -q -W --keep-going -c docs -d out/doctrees . out/docs

lab: $(VENV)/.lab  ## open the notebooks in JupyterLab
	$(BIN)/jupyter-lab notebooks

bench: $(VENV)/.ready  ## minglm on shape S beside what this machine can do; minutes. make bench SHAPE=M or all
	$(PY) -m minglm bench --shape $(or $(SHAPE),S) --json out/bench.json --plot out/bench.png

bench-all: $(VENV)/.bench  ## every shape, against torch and llama.cpp too (installs them, builds llama.cpp); an hour
	$(PY) -m minglm bench --shape all --json out/bench.json --plot out/bench.png

doctor: $(VENV)/.ready  ## versions, threads, memory, and what this machine can do
	$(PY) -m minglm doctor

train-tiny: $(VENV)/.ready  ## train weights/glm-tiny again (under two hours on four cores; stops and goes on)
	$(PY) -m minglm train glm-tiny --save weights/glm-tiny --force

train-nano: $(VENV)/.ready  ## train weights/glm-nano again (42 minutes on two cores)
	$(PY) -m minglm train glm-nano --save weights/glm-nano --force

train-pair: $(VENV)/.ready  ## train the balanced and the unbalanced small model again (some 20 minutes)
	$(PY) -m minglm train glm-tiny-balanced --save weights/glm-tiny-balanced --force
	$(PY) -m minglm train glm-tiny-unbalanced --save weights/glm-tiny-unbalanced --force

ablations: $(VENV)/.ready  ## the choices of GLM-4.5's authors, tried: docs/ablations.md (about four hours; goes on where it stopped)
	$(PY) -m minglm.train.ablations
	$(PY) -m minglm.train.ablations --report

clean:           ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras; each re-installs when pyproject.toml changes.
$(VENV)/.ready: EXTRAS =
$(VENV)/.test: EXTRAS = [test]
$(VENV)/.dev: EXTRAS = [dev]
$(VENV)/.parity: EXTRAS = [dev,parity]
$(VENV)/.bench: EXTRAS = [bench]
$(VENV)/.browser: EXTRAS = [browser]
$(VENV)/.notebooks: EXTRAS = [notebooks]
$(VENV)/.lab: EXTRAS = [lab]
$(VENV)/.docs: EXTRAS = [docs]
$(VENV)/.ready $(VENV)/.test $(VENV)/.dev $(VENV)/.parity $(VENV)/.bench $(VENV)/.browser $(VENV)/.notebooks $(VENV)/.lab $(VENV)/.docs: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".$(EXTRAS)"
	@touch $@

.PHONY: help setup demo test check-all parity browser elsewhere soak lint types notebooks lab docs bench bench-all doctor train-tiny train-nano train-pair ablations clean
