# `make serve` and `make test` are all a fresh clone needs; both install into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test lint format clean

serve: .venv/serve
	$(BIN)/rednet serve

test: lint
	$(BIN)/pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info

# Each of these two files marks a finished installation.
.venv/serve: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

.venv/test: .venv/serve requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
