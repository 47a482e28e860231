# Every target sets up .venv first when it is missing or older than pyproject.toml; a second call goes straight to work.
#   PYTHON=python3.12 make test             another interpreter for a new .venv
#   make test ARGS="tests/test_cli.py -x"   arguments for pytest, or for the recipe behind `make demo`
PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
READY  := .venv/.ready

# accelerate gives each process one CPU thread unless told otherwise, which would leave the other cores idle.
OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

# glibc gives large blocks back to the kernel and faults them in anew in every step; kept, a step on two cores took 0.7 of
# its time. Other C libraries do not know the names.
MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296

.DEFAULT_GOAL := help
.PHONY: help demo test check

# A .venv whose interpreter has gone (an upgrade of the system's Python) is set up anew, whatever its age.
ifeq ($(realpath $(BIN)/python),)
.PHONY: $(READY)
endif

help:   ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The four values are accelerate's own defaults; unsaid, it warns about each. --quiet: no second traceback from the launcher.
demo: $(READY)   ## distil the bundled CLIP, on a GPU when there is one, and show what came of it
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(MALLOC) $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no recipes/clip_kd.py $(ARGS)

test: $(READY)   ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)   ## ruff, pyright and the tests: what has to pass before a change lands
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest $(ARGS)

# The stamp is touched last, so an installation that broke off is taken up again.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "gkl-vl needs Python 3.10 or newer, not '$(PYTHON)': try PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "'$(PYTHON)' comes without venv or pip: install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check 'pip>=21.3'
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@
