# Every target makes .venv first, so that each works on a fresh machine with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint bench docs clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

# mypy and import-linter do not follow the editable install's finder: they read the package
# through symlinks.
.typing/draftsieve: Makefile
	rm -rf .typing && mkdir -p .typing/draftsieve
	ln -s ../../draftsieve/__init__.py ../../draftsieve/py.typed ../../core ../../integrations ../../retrievers .typing/draftsieve/

lint: $(STAMP) .typing/draftsieve
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy
	cd .typing && ../$(BIN)/lint-imports --config ../pyproject.toml

bench: $(STAMP)
	$(BIN)/python examples/benchmarks/compression_cost.py

docs: $(STAMP) .typing/draftsieve
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf .venv .typing .mypy_cache .ruff_cache .pytest_cache .import_linter_cache demo_output site
