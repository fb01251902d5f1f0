# Two commands: `make demo` and `make test`. All they install goes into .venv, with the versions of constraints.txt.
#
# torch on Linux x86-64: PyPI's build brings CUDA libraries along (several GB). On a machine without a GPU, tell pip
# where CPU builds are (the index that PyTorch's install page names, or a folder), with pip's own settings, for example
#   PIP_EXTRA_INDEX_URL=... make demo        or        PIP_FIND_LINKS=/folder/with/wheels make demo
# The pin torch==2.13.0 then resolves to the CPU build 2.13.0+cpu; nothing here can make pip prefer another.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# -qq: pip warns about every index that lacks a package; errors are still shown.
INSTALL := $(PIP) install -qq --constraint constraints.txt
# Two processes side by side, a file of tests in each. A thread for each: more would wait for cores.
# Files in their order, unit/ last: the longest ones have few tests, and xdist by itself begins those last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
EVERYTHING := --editable '.[dev,docs,pandas,datasets,flower,privacy,quantized,ray,wandb,mlflow]'

.PHONY: help demo demo-compare test quick house format lock clean bench docs package gpu-kit
help:
	@echo 'make demo     train, measure and export one adapter per client on a small real model (about 7 minutes)'
	@echo 'make demo-compare   MIRA, FedIT and training alone on the same tasks'
	@echo 'make test     lint, types, resolve check and all tests, as in CI'
	@echo 'make quick    lint, types and the tests that take 90 seconds'
	@echo 'make docs     build the documentation into build/site; a broken link fails'
	@echo 'make package  build wheel and sdist into dist'
	@echo 'make house    count the structure of the package against its targets'
	@echo 'make bench    speed and memory against PEFT loops, on real tasks in MIRA_NI_DATA (about 8 minutes)'
	@echo 'make gpu-kit  collect what a GPU machine without network lacks into build/gpu-kit (docs/cuda.md)'
	@echo 'make format   format, and fix lint where ruff can'
	@echo 'make lock     rewrite constraints.txt with the newest versions that resolve together'
	@echo 'make clean    remove .venv and caches (runs/ stays)'

demo: $(VENV)/.core
	$(BIN)/mira run configs/demo.yaml --out runs/demo-$$(date +%Y%m%d-%H%M%S)

demo-compare: $(VENV)/.core
	$(BIN)/mira compare configs/demo-compare.yaml

bench: $(VENV)/.core
	$(BIN)/python -m benchmarks

test: lint $(VENV)/.resolves
	$(PYTEST)

# mypy takes a minute of one core where it has no cache yet, so the tests do not wait for it.
quick: $(VENV)/.dev
	$(BIN)/ruff check && $(BIN)/ruff format --check
	$(BIN)/mypy --strict src benchmarks tools & types=$$!; $(PYTEST) -m 'not slow'; tests=$$?; wait $$types && exit $$tests

.PHONY: lint
lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict src benchmarks tools

gpu-kit: $(VENV)/.dev
	$(BIN)/python -m tools.gpu_kit

house: $(VENV)/.dev
	$(BIN)/python -m tools.house

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet
	@echo 'build/site/index.html'

package: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Stamps: a target is made again only when what it was made from is newer, so a second run starts at once.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo 'mira needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing pinned dependencies into $(VENV) (about 250 MB with the CPU build of torch) ...'
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo 'installing pinned developer tools, data set readers, bitsandbytes, Flower, Ray and trackers (about 410 MB) ...'
	@$(INSTALL) $(EVERYTHING)
	@touch $@

$(VENV)/.resolves: $(VENV)/.dev
	@echo 'checking that all extras resolve together ...'
	@$(INSTALL) --dry-run $(EVERYTHING)
	@touch $@

# What a fresh environment gets; labels such as +cpu are cut, so that the lock holds on every machine.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq 'torch==2.13.0' $(EVERYTHING)
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable \
	  | sed 's/+[a-z0-9]*$$//' | sort --ignore-case >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
