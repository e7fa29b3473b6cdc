# make reproduce   every notebook at the quick size, from nothing, in about a quarter of an hour on two cores
# make full        the paper's protocol (512 images, full attack budgets); hours, resumable
# make figures     every figure as PNG and PDF, from the committed records, under build/figures
# make benchmarks  what purifications and gradients cost, beside bare networks and the ways of others
# make docs        the site: build/docs/index.html, from the pages and the executed notebooks, in half a minute
# make test        linters, tests, and every notebook at smoke size; all of them, whatever fails. Before a release
#                  also under the oldest and the newest Python: make test PYTHON=python3.13 VENV=.venv-3.13
SHELL := /bin/bash -o pipefail
.DELETE_ON_ERROR:
.PHONY: setup reproduce full figures run test lint weights readme docs benchmarks clean

PYTHON ?= python3
BUDGET ?= quick
BUILDER ?= html
VENV ?= .venv
BIN := $(VENV)/bin
# results/, figures/ and notebooks/ hold what is committed. A reproduction computes its own, here, and compares
# at the end; run it again after a kill and it goes on where it stopped.
RESULTS ?= build/$(if $(filter full,$(BUDGET)),full,reproduced)/results
PUBLISHED ?= $(if $(filter full,$(BUDGET)),results,$(RESULTS))
FIGURES ?= build/$(if $(filter full,$(BUDGET)),full,reproduced)/figures
# Two notebooks run at a time; threads beyond a process's share make small networks slower, not faster.
THREADS ?= $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / 2 )); echo $$(( n > 0 ? n : 1 )))

export COUP_RESULTS = $(RESULTS)
export COUP_PUBLISHED = $(PUBLISHED)
export COUP_FIGURES = $(FIGURES)
export OMP_NUM_THREADS = $(THREADS)

reproduce: run
	@$(BIN)/python -m coup_lib.reporting.compare $(RESULTS)

full:
	@$(MAKE) --no-print-directory run BUDGET=full
	@COUP_RESULTS=build/full/results COUP_FIGURES=build/full/figures $(BIN)/python -m coup_lib.reporting.publishing
	@# Without the cell of parameters that papermill put in: a later run would obey it.
	@$(BIN)/jupyter nbconvert --log-level WARN --to notebook --output-dir notebooks \
		--TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags injected-parameters \
		$$(find build/notebooks-full -name '*.ipynb' ! -name '*_l2.ipynb')
	@$(MAKE) --no-print-directory readme

figures:
	@COUP_PDF=1 $(MAKE) --no-print-directory run BUDGET=full FIGURES=build/figures

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %d.%d; try make PYTHON=python3.12" % v[:2])'
	@echo "Installing into $(VENV) (PyTorch is several GB; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

run: setup
	@$(BIN)/python -m workflow.notebooks $(BUDGET)
	@$(if $(filter quick,$(BUDGET)),$(BIN)/python -m workflow.times build/notebooks-quick)
	@echo "Executed notebooks: build/notebooks-$(BUDGET); figures and tables: $(FIGURES); records: $(RESULTS)"

LINT = run $(BIN)/ruff check .; run $(BIN)/ruff format --check .; run $(BIN)/mypy
# Two tests at a time, with one thread each: what is small is no faster with more. In alphabetical order: files
# of a single long test would else come last, and leave one process idle.
PYTEST = $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -p no:benchmark
# Those that compare with published numbers and closed forms run as on an older processor, too.
OLDER = env ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
NUMERICAL = $(patsubst %,tests/test_%.py,wideresnet resnet ddpmpp edm sde solver gradients likelihood)

# Runs every command of its argument, also after one that fails; the last line says which did.
define all
failed=; run() { "$$@" || failed="$$failed$$(printf '\n  ')$$*"; }; $(1); \
[ -z "$$failed" ] || { echo "Failed:$$failed"; exit 1; }
endef

test: setup
	@export OMP_NUM_THREADS=1; $(call all,$(LINT); \
		run $(PYTEST) --nbval-lax notebooks tests; run $(OLDER) $(PYTEST) $(NUMERICAL))

lint: setup
	@$(call all,$(LINT))

weights: setup
	$(BIN)/coup train

# Puts the committed tables and numbers into README.md, the pages of docs/ and the notebooks' first cells.
readme: setup
	@$(BIN)/python -m coup_lib.reporting.readme

# Runs no notebook and fetches nothing; a broken link between pages, or any other warning, is an error.
# Where there is a network, make docs BUILDER=linkcheck asks every address on the pages, too.
docs: setup
	@rm -rf build/docs
	@$(BIN)/python -m sphinx -q -W --keep-going -b $(BUILDER) -c docs -d build/doctrees . build/docs
	@echo "The site: build/docs/index.html"

# For an idle machine. PART=test_full_size measures one file of benchmarks/ alone, and what it finds is put into
# what there is. COUP_BEFORE=FOLDER times the notebook of another checkout in turns with this one's.
benchmarks: setup
	@mkdir -p build
	@unset COUP_RESULTS COUP_PUBLISHED COUP_FIGURES; OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) \
		$(BIN)/pytest benchmarks$(if $(PART),/$(PART).py) --benchmark-json=build/benchmarks.json
	@unset COUP_RESULTS COUP_PUBLISHED; COUP_FIGURES=figures $(BIN)/python -m benchmarks.report build/benchmarks.json

clean:
	rm -rf build
