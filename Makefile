# make install   create a virtual environment in .venv with pyrolora and all that its tests need
# make demo      compare LoRA with its posterior on a small model; no network, three minutes
# make test      check format, lint and types; run the tests
# make docs      build the documentation as a site in build/site; what it warns of is an error
# make notebooks run the notebooks and keep their output
# make verify    run the slow tests: calibration, faults, several processes; planted faults; lowest
# make lowest    run some tests with the lowest versions that pyproject.toml allows
# make lock      write requirements.lock, the versions of all that is installed, anew
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
WORKERS ?= 2
# Each process has a stretch of the tests, so that those of a file share what they have made.
SPREAD := -n $(WORKERS) --dist worksteal

.PHONY: install demo test docs notebooks verify lowest lock clean

install: $(VENV)/.installed

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml requirements.lock tests/referees.txt
	$(PIP) install --constraint requirements.lock torch
	$(PIP) install --constraint requirements.lock --editable '.[dev]'
	$(PIP) install --no-deps --requirement tests/referees.txt
	touch $@

demo: install
	$(BIN)/pyrolora demo --output-dir pyrolora-demo

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" $(SPREAD) --durations 10
	OMP_NUM_THREADS=1 PYROLORA_DEVICE=mock $(BIN)/pytest $(SPREAD) tests/device

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --constraint requirements.lock --editable '.[docs]'
	touch $@

notebooks: install
	PYTHONWARNINGS=ignore TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error $(BIN)/jupyter execute --inplace notebooks/*.ipynb

verify: install $(VENV)/.docs build/quantisers/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(SPREAD) --durations 10
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutations.py --workers $(WORKERS)
	OMP_NUM_THREADS=1 PYTHONPATH=build/quantisers $(BIN)/pytest tests/storage/test_quantised.py
	$(MAKE) lowest

# Beside the environment: with these libraries in it every import takes longer.
build/quantisers/.installed: tests/quantisers.txt
	$(PIP) install --no-deps --target $(@D) --requirement tests/quantisers.txt
	touch $@

# An environment of its own: the lowest versions of what the package names, the newest of the rest.
LOWEST := build/lowest
TESTED_LOWEST := tests/guides/test_objective.py tests/arviz/test_arviz.py tests/storage/test_save_load.py

$(LOWEST)/.installed: pyproject.toml tests/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip --quiet install --constraint $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/pip --quiet install --constraint $(LOWEST)/constraints.txt --editable '.[peft,serve]' pytest
	touch $@

lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "not slow" -o filterwarnings=default --durations 3 $(TESTED_LOWEST)

# By pip-tools, with the pins of constraints.txt; the file has no address of an index, and no local
# version (2.13.0+cpu), which an index may not have: 2.13.0 allows every build of it.
build/tools/.installed:
	$(PYTHON) -m venv build/tools
	build/tools/bin/pip --quiet install pip-tools
	touch $@

lock: build/tools/.installed
	CUSTOM_COMPILE_COMMAND="make lock" build/tools/bin/pip-compile pyproject.toml --quiet --extra dev --extra docs --extra peft --extra serve \
		--constraint constraints.txt --output-file requirements.lock --annotation-style line \
		--allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-options
	sed -i -E 's/^([^ +]+==[^ +]+)\+[^ ;]+/\1/' requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
