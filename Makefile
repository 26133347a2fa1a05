# A thin front for `python -m regteach`, which does the work (and sets .venv up where it is missing).
# make course ARGS=--all      make test ARGS="--only static"      make PYTHON=python3.12 lab
PYTHON ?= python3
ARGS ?=

.PHONY: help course test lab doctor clean

help:
	@$(PYTHON) -m regteach --help

course test lab doctor:
	@$(PYTHON) -m regteach $@ $(ARGS)

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
