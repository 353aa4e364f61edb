# One environment for everything. `make quickstart` and `make test` set it up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast lint graph docs dist versions coverage setup
export NO_MKDOCS_2_WARNING = 1

quickstart: setup
	$(BIN)/python examples/quickstart.py

# Everything, or a part: make test T=tests/data
T ?=
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(T)

# Tests that take less than a second: no ranks, no commands, and none that took longer in its last run here.
test-fast: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --fast -m "not process and not slow and not gpu" $(T)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Imports between packages, for graphviz: make graph | dot -Tsvg > packages.svg; of one package: make graph OF=.strategy
OF ?=
graph: setup
	@$(BIN)/import-linter drawgraph lightning_pipelite$(OF) --show-cycle-breakers

# Strict: a warning, a broken link or a broken anchor is an error. Not quiet: only warnings that are shown count.
docs: setup
	$(BIN)/mkdocs build --strict --site-dir site

dist: setup
	$(BIN)/python -m build

# The tests that depend most on versions, with the lowest allowed and the newest tested ones. The tests of error
# messages are left out: jsonargparse's messages, and with them ours, differ between versions.
VERSIONS_TESTS = tests/cli/test_main.py tests/cli/test_commands.py tests/optim tests/strategy/test_engine.py tests/strategy/test_exactness.py \
	tests/models/test_stage.py tests/adapters/test_lora.py tests/export/test_merging.py tests/export/test_gguf.py \
	tests/data/test_datamodule.py tests/kernels/test_compiled_gradients.py tests/models/test_torch_compat.py \
	tests/models/attention/test_flash.py

versions: versions-constraints-lowest versions-constraints

versions-%:
	$(PYTHON) -m venv build/$@
	build/$@/bin/python -m pip install --quiet --disable-pip-version-check --constraint $*.txt . pytest pytest-timeout hypothesis
	PYTHONPATH= build/$@/bin/python -m pytest $(VERSIONS_TESTS)

coverage: setup
	$(BIN)/python benchmarks/coverage.py --write

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@
