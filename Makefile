PYTHON ?= python3
BIN := .venv/bin
.PHONY: test
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
test: .venv/ready
	$(BIN)/pytest
