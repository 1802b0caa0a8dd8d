# tldist: one word a habit. `make` alone lists them.
#
#   PYTHON=python3.12   which Python makes .venv (default: the first of at least 3.11 that is found)
#   JOBS=2              test processes
#   ARGS="-k fuse"      more arguments for pytest, or for tldist demo
#   PATTERN="resnet*"   for make table: some models, on pages in runs/ instead of docs/

PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
ARGS ?=
PATTERN ?= *
PAGES = $(if $(filter-out *,$(PATTERN)),runs,docs)
BIN := .venv/bin
STAMP := .venv/.installed
# One thread for each test process: two of them on two cores would otherwise fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: help demo test realdata table lint clean install

help:
	@echo "make demo      install into .venv, then tell the story of transfer learning (minutes, no network)"
	@echo "make test      install into .venv, then run the tests"
	@echo "make realdata  the tests on real photos, digits and weights (TLDIST_REAL_DATA, or ../shared/data)"
	@echo "make table     every torchvision classifier tried (docs/zoo.md: minutes) and exported (docs/export.md:"
	@echo "               hours; goes on where it stopped), 16 GB of memory; PATTERN='resnet*' for some of them"
	@echo "make lint      style, types and layers"
	@echo "make clean     remove .venv, caches and what the demo wrote"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "FAIL: no Python of at least 3.11 found; install one, or give PYTHON=..."; exit 1; }
	@echo "== .venv: installing tldist and what its tests need ($(PYTHON); the first time takes minutes: PyTorch is large)"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "== .venv: ready"

demo: $(STAMP)
	@echo "== demo: from printed digits to a checked ONNX model of handwritten ones; it writes runs/demo"
	@$(BIN)/tldist demo $(ARGS) && echo "== demo: PASS" || { echo "== demo: FAIL (read the lines above)"; exit 1; }

test: $(STAMP)
	@echo "== test: all tests that need neither a GPU nor the folder of real data ($(JOBS) processes)"
	@$(PYTEST) -m "not realdata and not gpu" $(ARGS) && echo "== test: PASS" || { echo "== test: FAIL"; exit 1; }

realdata: $(STAMP)
	@echo "== realdata: the tests on real photos, digits and weights"
	@$(PYTEST) -m "realdata" $(ARGS) && echo "== realdata: PASS" || { echo "== realdata: FAIL"; exit 1; }

table: $(STAMP)
	@echo "== table: every torchvision classifier, into $(PAGES)/zoo.md and $(PAGES)/export.md ($(PATTERN))"
	@mkdir -p runs && $(BIN)/python benchmarks/zoo_table.py --pattern '$(PATTERN)' --out $(PAGES)/zoo.md \
		&& $(BIN)/python benchmarks/export_table.py --pattern '$(PATTERN)' --out $(PAGES)/export.md \
		&& echo "== table: PASS" || { echo "== table: FAIL"; exit 1; }

lint: $(STAMP)
	@echo "== lint: ruff (style, format), mypy (types), import-linter (layers)"
	@{ $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports; } \
		&& echo "== lint: PASS" || { echo "== lint: FAIL"; exit 1; }

clean:
	@echo "== clean: removing .venv, caches, builds and runs/demo"
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist runs/demo
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "== clean: done"
