# Everything from a fresh clone: `make demo`, `make test`. Each makes the environment it needs, once.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := torch_meanfield recipes tests benchmarks tools

.PHONY: help install demo test test-oldest coverage mutation soak lint format format-check types zoo build clean

help:
	@echo "make demo   train the vanilla twin and mean-field ResNets on digits; table and picture in runs/demo"
	@echo "make test   run the tests"
	@echo "make test-oldest   run them on the oldest versions that setup.cfg admits, in an environment of their own"
	@echo "make coverage   run them and fail if they reach less than 95 % of the package's lines"
	@echo "make mutation   test the tests: mutants of the modules that move particles; benchmarks/results/mutation.md"
	@echo "make soak   kills, overflows, 100,000 steps, mutated files at length; benchmarks/results/soak.md"
	@echo "make lint   ruff          make format   ruff format          make types   mypy --strict on the package"
	@echo "make zoo    convert every model of timm and torchvision; benchmarks/results/zoo*.csv"
	@echo "make build  wheel and source archive in dist/"
	@echo "make clean  remove the environment and everything that was built"
	@echo "PYTHON=$(PYTHON) (3.10 or newer), VENV=$(VENV)"

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[timm,lightning,test,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python recipes/demo.py

# One thread for each worker: two workers on two cores are faster than one with two threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# The lower bounds of setup.cfg become pins, but for the tools of the tests. Old releases warn of what their newer
# dependencies have deprecated since: there, warnings are no errors.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	sed -n '/^install_requires/,/^test =/s/^    \([A-Za-z0-9_-]*\)\(\[.*\]\)\{0,1\}>=\([0-9.]*\)$$/\1==\3/p' setup.cfg >$(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/oldest.txt --editable '.[timm,lightning,test]'
	@cat $(OLDEST)/oldest.txt
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) -W default

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov=torch_meanfield

# About an hour on two cores. Resumes where it stopped; remove mutants/ to begin anew.
mutation: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutation.py --workers $(WORKERS)

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py

lint: $(STAMP)
	$(BIN)/ruff check $(wildcard $(SOURCES))

format: $(STAMP)
	$(BIN)/ruff format $(wildcard $(SOURCES))

format-check: $(STAMP)
	$(BIN)/ruff format --check $(wildcard $(SOURCES))

types: $(STAMP)
	$(BIN)/mypy --strict torch_meanfield

# Resumes where it stopped; remove the tables to begin anew.
zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/zoo.py --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python tools/zoo.py --workers $(WORKERS) --cut
	OMP_NUM_THREADS=1 $(BIN)/python tools/zoo.py --workers $(WORKERS) --library torchvision

build: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* mutants
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
