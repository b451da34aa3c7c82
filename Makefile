# make setup | demo | test | check. Each does its own set-up: a virtual environment in .venv with pinned versions.
# Without an NVIDIA GPU the default torch still works but brings CUDA libraries along; name an index of CPU builds, or
# anything else pip understands, in TORCH_ARGS:  make demo TORCH_ARGS="--index-url URL"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
DEMO_OUT ?= demo-out
WORKERS ?= 2
STAMP := $(VENV)/.installed

.PHONY: setup demo test check clean

setup: $(STAMP)

# torch goes first and alone, so that the build chosen here is the one that the rest finds satisfied.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steep needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: setup
	$(VENV)/bin/steep demo --out $(DEMO_OUT)

# One thread of torch for each worker; a file stays with one worker, for its fixtures.
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python tests/typecheck.py

clean:
	rm -rf $(VENV) build *.egg-info
