# Needs python3 with venv, a C++17 compiler and make; everything else comes into .venv.
#
#   make demo                     sets up, then draws images with a plain loop and with ddpm_fast
#   make test                     sets up, then runs the tests that are not marked slow
#   make test PYTEST_ARGS="-m slow"   the others
#   make bench                    sets up, then prints the benchmarks' tables
#   make PYTHON=python3.12 ...    another Python for .venv
#   make TORCH="torch" ...        another torch: anything that `pip install` takes, options included
#
# The set-up is done once and again only where its inputs changed; `make clean` removes it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: setup demo test bench lint clean

setup: $(VENV)/package.stamp

demo: $(VENV)/package.stamp
	$(RUN) -m ddpm_fast demo --out demo-output

test: $(VENV)/test.stamp
	$(RUN) -m pytest $(PYTEST_ARGS)

bench: $(VENV)/bench.stamp
	$(RUN) -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/lint.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info ddpm_fast/_C*.so ddpm_fast/_cuda*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is named in every command, lest pip replace it by another build.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77" wheel ninja
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) $(TORCH) --no-build-isolation --editable .
	@touch $@

# The package is installed already: these add what its extras ask for.
$(VENV)/test.stamp: $(VENV)/package.stamp tests/third_party/requirements.txt
	$(PIP) $(TORCH) "ddpm_fast[test]"
	$(PIP) --no-deps --requirement tests/third_party/requirements.txt
	@touch $@

$(VENV)/bench.stamp: $(VENV)/test.stamp
	$(PIP) $(TORCH) "ddpm_fast[bench]"
	@touch $@

# mypy reads the tests' runner too, and with it what that imports.
$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(PIP) $(TORCH) "ddpm_fast[lint]"
	@touch $@
