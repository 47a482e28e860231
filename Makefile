# Every target first sets up .venv if it is missing or older than pyproject.toml.
#   PYTHON=python3.12 make test             another interpreter for a new .venv
#   make test ARGS="tests/test_cli.py -x"   arguments for pytest, or for the recipe behind `make demo`
PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
READY  := .venv/.ready

# Without OMP_NUM_THREADS accelerate gives each process one CPU thread, which leaves the other cores idle.
OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

# By default glibc returns large blocks to the kernel and page-faults them in again in every step. These settings keep
# them: a step on two cores took 0.7 of the time. Other C libraries ignore the names.
MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296

.DEFAULT_GOAL := help
.PHONY: help demo test check docs

# A .venv whose interpreter no longer exists (an upgrade of the system's Python) is set up again, whatever its age.
ifeq ($(realpath $(BIN)/python),)
.PHONY: $(READY)
endif

help:   ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The four values are accelerate's defaults; it warns about each one not given. --quiet: no traceback of the launcher.
demo: $(READY)   ## distil the bundled CLIP, on a GPU if there is one, and print a table
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(MALLOC) $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no recipes/clip_kd.py $(ARGS)

test: $(READY)   ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)   ## ruff, pyright and the tests, which must pass before a merge
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest $(ARGS)

docs: $(READY)   ## build the site of docs/ in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The stamp is touched last, so that an interrupted installation is repeated.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "gkl-vl needs Python 3.10 or newer, not '$(PYTHON)': try PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "'$(PYTHON)' comes without venv or pip: install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check 'pip>=21.3'
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@
