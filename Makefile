# scripts/setup.sh builds .venv from a committed lock; PYTHON=python3.12 chooses the interpreter.
SHELL := bash
PY := .venv/bin/python
WORKERS ?= 3
BENCHMARKS ?= token_logps engine demo_step step

export TOKENIZERS_PARALLELISM ?= false
export PYTHONDONTWRITEBYTECODE =  # keep bytecode: compiling torch and transformers takes half a minute
ifeq ($(wildcard /dev/nvidia0),)
export DS_ACCELERATOR ?= cpu
endif
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
SITE := NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(PY) -m mkdocs build --strict --quiet
ONE_THREAD := OMP_NUM_THREADS=1  # one test worker per core

.DEFAULT_GOAL := help
.PHONY: help env demo real test check docs bench gpu lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## build the environment only; LOCK=demo-cpu omits vLLM, TRL, PEFT and Ray
	@bash scripts/setup.sh $(or $(LOCK),test-cpu)

demo:  ## corpus, base, RLP and controls: one table, runs/demo/results.json
	@bash scripts/setup.sh demo-cpu
	$(OFFLINE) $(PY) -m examples.demo $(ARGS)

real:  ## hours (an estimate): RLP on SmolLM2-135M and sentences of GSM8K, and its controls: runs/smollm2/results.json (ARGS=--quick: minutes)
	@bash scripts/setup.sh demo-cpu
	@bash scripts/setup.sh real-cpu
	$(OFFLINE) $(PY) -m examples.smollm2_rlp $(ARGS)

test:  ## all tests (ARGS="-k name" for some, "-m learning" for a long one, WORKERS=0 in one process)
	@bash scripts/setup.sh test-cpu
	@bash scripts/setup.sh real-cpu
	$(OFFLINE) $(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check:  ## ruff (rules and format), pyright, the architecture test, the documentation site
	@bash scripts/setup.sh test-cpu
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pytest -q tests/test_architecture.py
	@SITE_SEARCH=false $(SITE) --site-dir build/site

docs:  ## the documentation site, site/index.html
	@bash scripts/setup.sh docs-cpu
	$(SITE)

bench:  ## every benchmark of the list BENCHMARKS, as JSON
	@bash scripts/setup.sh test-cpu
	@for name in $(BENCHMARKS); do $(OFFLINE) $(PY) -m benchmarks.$$name --json || exit 1; done

gpu:  ## what runs on a GPU, measured (PYTHON=python3 has torch with CUDA; MINUTES=8; docs/gpu.md)
	$(or $(PYTHON),python3) -m benchmarks.gpu --minutes $(or $(MINUTES),8) $(ARGS)

lock:  ## resolve locks/*.txt again (ARGS=--upgrade for newer versions)
	@bash scripts/setup.sh lock $(ARGS)

clean:  ## remove .venv, build products and caches; runs/ stays
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
