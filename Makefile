# Every target makes .venv first, so that each works on a fresh machine with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test models lint bench table data-named docs clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# SmolLM2-135M-Instruct (93 MB) into DRAFTSIEVE_HOME, or the platform's cache folder.
models: $(STAMP)
	$(BIN)/draftsieve models get smollm2-135m

# One process a core, each with one thread and its own models; idle ones take tests from busy ones.
test: $(STAMP)
	$(BIN)/python -m pytest -rs -n auto --maxprocesses 4 --dist worksteal

# mypy and import-linter do not follow the editable install's finder: they read the package
# through symlinks.
.typing/draftsieve: Makefile
	rm -rf .typing && mkdir -p .typing/draftsieve
	ln -s ../../draftsieve/__init__.py ../../draftsieve/__main__.py ../../draftsieve/py.typed ../../core ../../integrations ../../retrievers .typing/draftsieve/

lint: $(STAMP) .typing/draftsieve
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy
	cd .typing && ../$(BIN)/lint-imports --config ../pyproject.toml

# Both parts: what compression costs in seconds (a minute), and what it costs in accuracy.
bench: $(STAMP)
	$(BIN)/python examples/benchmarks/compression_cost.py
	$(MAKE) table DATA=$(or $(DATA),none)

# A table like that of docs/results.md, about 80 minutes on two cores. DATA names a file with natural text in
# SQuAD's format (docs/evaluation.md says where such are published); DATA=none leaves natural text out. Two
# processes of one thread are faster than one of two; each goes on where it was stopped, and the last command only
# writes the report.
EVAL := $(BIN)/draftsieve eval --target builtin:target --draft builtin:draft --methods table tova key_norm prompt \
	--budget 0.25 0.125 0.0625 --items 200 $(if $(filter-out none,$(DATA)),--data $(DATA) --data-items 60) \
	--max-new-tokens 32
TABLE := .bench/table

data-named:
	@test "$(DATA)" = none || test -f "$(DATA)" || { echo "make table: say DATA=FILE, natural text in SQuAD's format" \
		"(docs/evaluation.md says where such files are published), or DATA=none for generated tasks alone." >&2; exit 2; }

table: data-named $(STAMP)
	mkdir -p $(TABLE)
	OMP_NUM_THREADS=1 $(EVAL) --length 4000 --out $(TABLE)-4000 & \
	OMP_NUM_THREADS=1 $(EVAL) --length 1000 2000 --out $(TABLE); wait
	cat $(TABLE)-4000/results.jsonl >> $(TABLE)/results.jsonl
	$(EVAL) --length 1000 2000 4000 --out $(TABLE)

docs: $(STAMP) .typing/draftsieve
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf .venv .typing .mypy_cache .ruff_cache .pytest_cache .import_linter_cache demo_output site
