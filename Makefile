# Two commands matter: `make demo` and `make test`. Both set up a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
# A CPU build of torch is enough for the demo and the tests; override for a GPU: make demo TORCH=torch
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test check format bench clean

demo: $(VENV)/.ready
	$(BIN)/imprint run recipes/demo.yaml --out runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/grid.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/control.py tiny/gpt2-medium world/triples --records 2000 --seeds 200 --each 300

# torch goes first: left to the resolver, it would bring gigabytes of GPU libraries
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
