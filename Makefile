# Everything a fresh machine needs: Python 3.11 or newer, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# More for pip, such as an index that holds the CPU build of torch (see README.md)
PIP_ARGS ?=
BIN := .venv/bin
# A process of tests for each core, but no more than four: some of them take 2 GB
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses=4 --dist=worksteal
# Slow tests take turns, a quarter each day; TURN=1/1 runs them all
TURN ?= $(shell echo $$(($$(date +%s) / 86400 % 4 + 1)))/4
INSTALLED := .venv/.installed

.PHONY: demo test setup lint format bench constraints clean

demo: $(INSTALLED)
	$(BIN)/metnet demo $(DEMO)

test: lint
	$(BIN)/python -m pytest -m "not compile" $(PARALLEL) --turn=$(TURN) --jaxtyping-packages=metnet,beartype.beartype $(PYTEST)
	$(BIN)/python -m pytest -m compile $(PARALLEL) --turn=$(TURN) $(PYTEST) || test $$? -eq 5

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"metnet needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}: make PYTHON=... names another" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv/ (once; about two minutes)"
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[serve,verify,onnx,dev]'
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH)

constraints: $(INSTALLED)
	{ echo "# Exact versions that the tests pass with (Python 3.11); made by: make constraints"; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep -v '^-e' | sed 's/+cpu//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf .venv out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
