# The front door. `make` prints this help; every target sets up what it needs.
PYTHON ?= python3
NORM ?=
MODEL ?=
DATA ?=
SEED ?=
CONFIG ?=
CLAIM ?=
SCALE ?=
WHERE ?=
STACK ?=
ENTITY ?=
PROJECT ?=
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
# make would look for commands in what it hands on.
unexport NORM MODEL DATA SEED CONFIG CLAIM SCALE WHERE STACK ENTITY PROJECT

# What a variable holds, as one word for the shell: neither make nor the shell looks for commands in it.
quoted = '$(subst ','\'',$(value $(1)))'
# The flag of a variable, if it has a value: its name, and the variable's.
flag = $(if $(value $(2)),$(1) $(call quoted,$(2)))

.DEFAULT_GOAL := help
.PHONY: help setup train study report exact test check format status watch dashboard norms metrics bench bench-runs \
	lock clean

help: ## print this help
	@echo "normlab: which normalization, in which network, on which text?"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  variables of make train:"
	@echo "    NORM    $$(grep -l '^@final' src/normlab/norms/*.py | xargs -n1 basename -s .py | tr '\n' ' ')(docs/norms.md)"
	@echo "    MODEL   lstm transformer mlp hf:gpt2 hf:llama hf:bert ... (an architecture of transformers)"
	@echo "    DATA    pydocs ptb_char sst2 ... or a path: a .txt file, a folder of them, a .csv / .tsv / .jsonl"
	@echo "    SEED    of weights, batch order and dropout"
	@echo "    CONFIG  a file in configs/"
	@echo "    ARGS    any other flag, e.g. ARGS=\"--optim.lr 1e-3 --training.steps 1000\""
	@echo
	@echo "  variables of make study:"
	@echo "    CLAIM   an argument's id or the beginning of it, the letter of a section, or all"
	@echo "    SCALE   small (CPU, minutes) or full (one GPU)"
	@echo "    WHERE   local (processes on this machine) or slurm (jobs of a cluster: docs/running.md)"
	@echo "    STACK   runs trained as one model: 1 never, a number up to so many; else several where that is faster"
	@echo
	@echo "  make train NORM=ln MODEL=lstm DATA=ptb_char SEED=3"
	@echo "  every flag: $(PY) -m normlab train --help"

setup: $(READY) ## make .venv with the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "normlab needs Python 3.11 or newer; this is $$($(PYTHON) --version 2>&1). Give another with make PYTHON=python3.12"; exit 2; }
	@test -x $(VENV)/bin/pip || { echo "setup: making $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 2; }; }
	@echo "setup: installing the versions of constraints.txt (once; a few minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

train: $(READY) ## train one run: NORM MODEL DATA SEED CONFIG ARGS
	@$(PY) -m normlab train $(call flag,--config,CONFIG) $(call flag,--model,MODEL) $(call flag,--norm,NORM) $(call flag,--data,DATA) $(call flag,--seed,SEED) $(ARGS)

study: $(READY) ## run what an argument still misses: CLAIM SCALE WHERE STACK; without CLAIM list all
	@$(PY) -m normlab study $(if $(value CLAIM),$(call quoted,CLAIM)) $(call flag,--scale,SCALE) $(call flag,--where,WHERE) $(call flag,--stack,STACK) $(ARGS)

exact: $(READY) ## compute the arguments that are true or false by mathematics: results/exact.json
	@$(PY) -m normlab exact $(ARGS)

report: $(READY) ## judge all arguments: results/report.html, report.md and the table of the README
	@$(PY) -m normlab report $(ARGS)

test: $(READY) ## run the test suite
	@$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

check: $(READY) ## lint, types, direction of imports
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright
	@$(VENV)/bin/lint-imports

format: $(READY) ## format and fix what can be fixed
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

status: $(READY) ## how far all runs are, also while they run; ARGS: --watch, --state running,failed, --claim d2, --json
	@$(PY) -m normlab status $(ARGS)

watch: $(READY) ## watch runs in the terminal: their curves if W&B mirrors them, else the table of make status, live
	@$(PY) -m normlab watch $(ARGS)

dashboard: $(READY) ## W&B workspaces and report of all arguments: ENTITY PROJECT; without an account as files
	@$(PY) scripts/wandb_workspace.py $(call flag,--entity,ENTITY) $(call flag,--project,PROJECT) $(ARGS)

norms: $(READY) ## write docs/norms.md and its pictures anew from what the norms declare
	@$(PY) scripts/norms_table.py

metrics: $(READY) ## write docs/metrics.md anew from the list of what runs log
	@$(PY) scripts/metrics_table.py

bench: $(READY) ## what norms cost in an LSTM (beside torch.nn.LSTM) and in a Transformer (beside ln); ARGS: the LSTM alone
	@$(PY) scripts/bench_recurrence.py $(ARGS)
	@$(if $(ARGS),true,$(PY) scripts/bench_transformer.py)

bench-runs: $(READY) ## runs per hour on this machine, with so many at once (docs/running.md)
	@$(PY) scripts/bench_runs.py $(ARGS)

lock: $(READY) ## write constraints.txt anew from what .venv holds
	@$(PY) -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > constraints.txt

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build src/*.egg-info
