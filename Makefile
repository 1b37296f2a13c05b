PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types docs bench
# A CPU build of torch comes first, by its exact pin, so that nothing below pulls in a CUDA one.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/dev-ready: .venv/ready
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q -c constraints.txt --no-deps bfcl-eval
	touch $@

demo: .venv/ready
	$(BIN)/attar demo

# A process for each core, each with one thread: the models of the tests are too small for more.
test: .venv/dev-ready lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: .venv/dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_cli.py --check

types: .venv/dev-ready
	$(BIN)/mypy

docs: .venv/dev-ready
	$(BIN)/python docs/generate_cli.py

bench: .venv/dev-ready
	$(BIN)/python benchmarks/label_throughput.py
	$(BIN)/python benchmarks/router.py
	$(BIN)/python benchmarks/tiny_architectures.py
