# World Models. `make help` lists the targets; every one works without display, GPU or root.
PYTHON ?= python3
VENV := .venv
WM := $(VENV)/bin/wm
ARGS ?=
SCALE ?= demo
GRIDS := $(patsubst ablations/%.yaml,ablation-%,$(wildcard ablations/*.yaml))
PORT ?= 5000
# A module's tests share what they make, so they stay together.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadscope

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/installed  ## create .venv and install the project

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	touch $@

demo: setup  ## take-cover at a small scale, from the first frame to a score (11 minutes)
	$(WM) run env=takecover scale=demo $(ARGS)

carracing: setup  ## the full CarRacing pipeline (32 minutes on 2 cores)
	$(WM) run env=carracing scale=laptop $(ARGS)

takecover: setup  ## the full take-cover pipeline (26 minutes on 2 cores)
	$(WM) run env=takecover scale=laptop $(ARGS)

ablation-%: setup  ## one grid, as ablation-temperature; SCALE=smoke|demo|laptop, ARGS=--dry-run
	$(WM) ablate ablations/$*.yaml scale=$(SCALE) $(ARGS)

ablations: $(GRIDS)  ## all grids; `make -k ablations` goes on after a failed grid

bench: setup  ## time the parts beside what they are measured against (under 10 minutes)
	$(WM) bench $(ARGS)

ui: setup  ## browse all runs in MLflow, on this machine only
	@mkdir -p runs
	$(VENV)/bin/mlflow ui --host 127.0.0.1 --port $(PORT) \
	  --allowed-hosts 127.0.0.1:$(PORT),localhost:$(PORT) \
	  --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db

test: $(VENV)/tested  ## run the test suite; ARGS='-m slow' runs every grid at its smallest
	$(PYTEST) --ignore=tests/reliability $(ARGS)

test-reliability: $(VENV)/tested  ## that a run survives kills, full disks and damage
	$(PYTEST) tests/reliability $(ARGS)

lint: $(VENV)/tested  ## check format and style
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A pattern cannot be phony: no file is called ablation-NAME.
.PHONY: help setup demo carracing takecover ablations bench ui test test-reliability lint clean
