# make reproduce   every notebook at the quick size, from nothing, in about ten minutes on two cores
# make full        the paper's protocol (512 images, full attack budgets); hours, resumable
# make test        linters, tests, and every notebook at smoke size
SHELL := /bin/bash -o pipefail
.DELETE_ON_ERROR:
.PHONY: setup reproduce full run test lint weights readme clean

PYTHON ?= python3
BUDGET ?= quick
# The committed records are in results/. A reproduction computes its own, here, and compares them at the end;
# run it again after a kill and it goes on where it stopped.
RESULTS ?= build/reproduced
BIN := .venv/bin
DONE := build/done-$(BUDGET)
# Two notebooks run at a time; threads beyond a process's share make small networks slower, not faster.
THREADS ?= $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / 2 )); echo $$(( n > 0 ? n : 1 )))

export COUP_RESULTS = $(RESULTS)
export OMP_NUM_THREADS = $(THREADS)

reproduce: run
	@$(BIN)/python -m coup_lib.compare $(RESULTS)

full:
	@$(MAKE) --no-print-directory run BUDGET=full

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %d.%d; try make PYTHON=python3.12" % v[:2])'
	@echo "Installing into .venv (PyTorch is several GB; some minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

# Two streams: 04 after 02, because they share attacks; 00 and the other norm beside them. What a notebook
# runs by default, the quick size, takes its place in notebooks/.
run: setup
	@rm -rf $(DONE) && mkdir -p $(DONE) build/notebooks
	@$(MAKE) --no-print-directory -j2 $(DONE)/04_autoattack $(DONE)/04_autoattack_l2
	@$(if $(SIZE),true,cp build/notebooks/{00_toy_analysis,02_ablation,04_autoattack}.ipynb notebooks/)
	@echo "Executed notebooks: build/notebooks; figures and tables: figures/; records: $(RESULTS)"

SIZE = $(if $(filter quick,$(BUDGET)),,-p budget $(BUDGET))
# Of a notebook's output, the progress and whatever went wrong.
SHOW = while IFS= read -r line; do case "$$line" in \
	*gone*|*"attacks in"*|*Error*|*override*) echo "$(1): $$line";; esac; done

# $(call execute,name,notebook,parameters)
define execute
	@echo "$(1): started"
	@$(BIN)/papermill --no-progress-bar --log-output \
		notebooks/$(2).ipynb build/notebooks/$(1).ipynb $(3) 2>&1 | $(SHOW)
	@echo "$(1): done" && touch $@
endef

$(DONE)/00_toy_analysis:
	$(call execute,00_toy_analysis,00_toy_analysis)

$(DONE)/02_ablation:
	$(call execute,02_ablation,02_ablation,$(SIZE))

$(DONE)/04_autoattack: $(DONE)/02_ablation
	$(call execute,04_autoattack,04_autoattack,$(SIZE))

$(DONE)/04_autoattack_l2: $(DONE)/00_toy_analysis
	$(call execute,04_autoattack_l2,04_autoattack,-p norm l2 $(SIZE))

test: setup lint
	@unset COUP_RESULTS; OMP_NUM_THREADS=2 $(BIN)/pytest
	@unset COUP_RESULTS; OMP_NUM_THREADS=2 $(BIN)/pytest --nbval-lax notebooks

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

weights: setup
	$(BIN)/python -m coup_lib.train

# Puts the committed tables and numbers into README.md.
readme: setup
	@$(BIN)/python -m coup_lib.readme

clean:
	rm -rf build
