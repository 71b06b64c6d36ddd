# make demo: everything, on the built-in data set. make test: the tests. make faults: many kills and broken files. All make their own environment
# in .venv first.
PYTHON ?= python3
CONSTRAINTS ?= -c tests/constraints.txt
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: demo test faults lint bench clean

demo: .venv/installed
	$(RUN) cache_embeddings.py --dataset shapes
	$(RUN) train.py --dataset shapes --method all --recipe small
	$(RUN) eval.py --dataset shapes --method all

test: .venv/installed-tests
	$(RUN) -m pytest -q

faults: .venv/installed-tests
	$(RUN) -m tests.faults

lint: .venv/installed-tests
	$(BIN)/ruff check --config tests/ruff.toml .
	$(BIN)/ruff format --config tests/ruff.toml --check .

.venv/installed: requirements.txt tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(CONSTRAINTS) -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/pip install -q $(CONSTRAINTS) -r tests/requirements.txt
	touch $@

bench: .venv/installed
	$(RUN) -m tests.benchmarks.train_step
	$(RUN) -m tests.benchmarks.evaluation
	$(RUN) -m tests.benchmarks.caching

clean:
	rm -rf .venv data/shapes embeddings/shapes checkpoints/shapes results/shapes
