VENV     := .venv
BIN      := $(VENV)/bin
PYTHON   ?= $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP      := $(BIN)/python -m pip -qq --disable-pip-version-check
SEED     ?= 0
# Two workers of one thread each: as fast as it gets on two cores.
WORKERS  ?= 2
PYTEST   := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
DECLARED := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow mutation lint format bench samplers methods preferences docs dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## create .venv with Keel and its development tools; instant when nothing changed
	@:

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Keel needs Python 3.11 or newer; name one with: make install PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(DECLARED) | $(BIN)/python
	@echo "Installing Keel and what it needs into $(VENV); the first time this takes a few minutes ..."
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(DECLARED) $(VENV)/.installed
	@echo "Installing the tools of the documentation into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

demo: install  ## run the demonstration (SEED=0)
	@$(BIN)/keel demo --seed $(SEED)

test: install  ## run the tests and doctests, the slow ones left out (WORKERS=2)
	$(PYTEST)

test-slow: install  ## run the slow tests only
	$(PYTEST) -m slow

mutation: install  ## plant faults into the formulas and see which ones the tests miss (FAULTS=300)
	$(BIN)/python tests/mutation --workers $(WORKERS) --limit $(or $(FAULTS),300) --seed $(SEED)

lint: install  ## check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/keel
	$(BIN)/lint-imports

format: install  ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed-bench: $(DECLARED) $(VENV)/.installed
	@echo "Installing what is measured beside Keel into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e ".[bench]"
	@touch $@

bench: $(VENV)/.installed-bench  ## measure Keel and its peers in turns, write docs/benchmarks.md (some 25 minutes)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks --write

samplers: install  ## measure every sampler on countdown, write docs/sampling.md (some 15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.samplers --write

methods: install  ## run the cells of the comparison that are missing or stale, write docs/methods.md (hours the first time; MINUTES=60)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.methods --vouch --write $(if $(MINUTES),--budget $(MINUTES))

preferences: install  ## run every loss of comparisons on the same pairs, write docs/pairs.md (some 30 minutes the first time; MINUTES=60)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.preference_losses --write $(if $(MINUTES),--budget $(MINUTES))

docs: $(VENV)/.installed-docs  ## verify all recipes, write what was found, build the documentation into site/
	OMP_NUM_THREADS=1 $(BIN)/python -m keel.verify.page docs
	$(BIN)/mkdocs build --strict

dist: install  ## build the wheel into dist/ and try it in an empty virtual environment
	@rm -rf dist
	$(BIN)/python -m build --wheel
	@set -e; trial=$$(mktemp -d); trap 'rm -rf "$$trial"' EXIT; trap 'exit 130' INT TERM; \
	echo "Installing the wheel in an empty virtual environment ..."; \
	constraints="$$PWD/constraints.txt"; wheel=$$(ls "$$PWD"/dist/*.whl); \
	$(BIN)/python -m venv "$$trial/venv"; cd "$$trial"; \
	venv/bin/python -m pip -qq --disable-pip-version-check install -c "$$constraints" "$$wheel"; \
	venv/bin/keel --help; \
	venv/bin/python -c "import keel; print('keel', keel.__version__, 'imports from', keel.__file__)"; \
	echo "The wheel works: $$wheel"

clean:  ## remove caches and builds; .venv and runs/ stay
	@rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage htmlcov
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
