# What is done by hand and by CI. `make` alone lists the targets.
# Needs Python 3.11 or newer and a package index; `kafka` and `test-kafka` also Java 17 and Maven.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PORT   ?= 9092
BENCH  ?= throughput
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit kafka kafka-stop test-kafka bench bench-quality lint build clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile | awk '{ name = $$1; sub(/^[^ ]* */, ""); printf "%-12s %s\n", substr(name, 1, length(name) - 1), $$0 }'

setup: $(STAMP)  ## .venv with everything in it, kernels compiled; nothing to do when pyproject.toml is unchanged

# uv comes from the index too, into the environment that it then fills. Bytecode is compiled here: uv leaves it
# out, and where Python may not write it every process would do it again, seven seconds a start instead of three.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode -e '.[dev]'
	$(BIN)/python -m compileall -q models streams trainer crosscurrent.py
	$(BIN)/python -m streams.warm
	touch $@

demo: setup  ## the whole thing in one terminal; ARGS="--seconds 60"
	$(BIN)/crosscurrent demo $(ARGS)

# Exit status 5: of what ARGS names, nothing was of this half.
test: setup  ## all tests, on the embedded broker; those on real data skip where CROSSCURRENT_DATA is absent
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not broker and not demo" $(ARGS) || [ $$? -eq 5 ]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "broker or demo" $(ARGS) || [ $$? -eq 5 ]

test-unit: setup  ## the tests that need neither a broker nor data, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not broker and not demo and not data" $(ARGS)

kafka: setup  ## Apache Kafka on this machine, PORT=9092, in the background
	$(BIN)/python deploy/kafka/local_kafka.py start --port $(PORT)

kafka-stop: setup  ## end it; its records go with it
	$(BIN)/python deploy/kafka/local_kafka.py stop

test-kafka: setup  ## the tests with a broker, on Apache Kafka of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m broker --broker=kafka $(ARGS)

bench: setup  ## a benchmark: BENCH=throughput ARGS="..."
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

bench-quality: setup  ## how well it predicts, on the data sets of CROSSCURRENT_DATA; ARGS="--quick --json FILE"
	PYTHONPATH=. $(BIN)/python benchmarks/quality.py $(ARGS)

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

build: setup  ## wheel and sdist in dist/
	rm -rf dist
	$(BIN)/python -m build --installer uv

clean:  ## everything that this file made, .venv too
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
