# make install   create a virtual environment in .venv with pyrolora and all that its tests need
# make demo      compare LoRA with its posterior on a small model; no network, three minutes
# make test      check format, lint and types; run the tests
# make docs      build the documentation as a site in build/site; what it warns of is an error
# make notebooks run the notebooks and keep their output
# make verify    run the slow tests: calibration, faults, several processes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
WORKERS ?= 2

.PHONY: install demo test docs notebooks verify clean

install: $(VENV)/.installed

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml constraints.txt tests/referees.txt
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --no-deps --requirement tests/referees.txt
	touch $@

demo: install
	$(BIN)/pyrolora demo --output-dir pyrolora-demo

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(WORKERS) --durations 10
	OMP_NUM_THREADS=1 PYROLORA_DEVICE=mock $(BIN)/pytest -n $(WORKERS) tests/device

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[docs]'
	touch $@

notebooks: install
	PYTHONWARNINGS=ignore TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error $(BIN)/jupyter execute --inplace notebooks/*.ipynb

verify: install $(VENV)/.docs build/quantisers/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n $(WORKERS) --durations 10
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutations.py --workers $(WORKERS)
	OMP_NUM_THREADS=1 PYTHONPATH=build/quantisers $(BIN)/pytest tests/storage/test_quantised.py

# Beside the environment: with these libraries in it every import takes longer.
build/quantisers/.installed: tests/quantisers.txt
	$(PIP) install --no-deps --target $(@D) --requirement tests/quantisers.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
