# What a developer runs. `make test` and `make tour` set everything up by themselves.
#
# Needed beforehand: Python 3.10 or newer and a C++ compiler. Where PYTHON has a torch that we support, the package is
# installed next to it; otherwise into .venv, with a torch of its own.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/rules/* csrc/derivatives/*)
VENV_READY := .venv/.torch-installed

# Prints the version of torch if it is one that pyproject.toml allows.
TORCH_OF = $(1) -c 'import torch; v = torch.__version__; assert (2, 11) <= tuple(map(int, v.split(".")[:2])) < (2, 14); print(v)' 2>/dev/null

ifneq ($(filter-out help clean,$(MAKECMDGOALS)),)
  TORCH_VERSION := $(if $(and $(wildcard $(VENV_READY)),$(filter file default,$(origin PYTHON))),,$(shell $(call TORCH_OF,$(PYTHON))))
  PY := $(if $(TORCH_VERSION),$(PYTHON),.venv/bin/python)
  TORCH_VERSION := $(or $(TORCH_VERSION),$(shell cat $(VENV_READY) 2>/dev/null))
  # What was built for another interpreter or torch is built again.
  READY_FOR := $(PY) $(TORCH_VERSION)
  ifneq ($(strip $(shell cat build/ready 2>/dev/null)),$(READY_FOR))
    $(shell rm -f build/ready)
  endif
endif

.PHONY: help build tour notebooks test clients lint docs bench clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo
	@echo "  PYTHON=python3.12   the interpreter to use, or to make .venv with"
	@echo "  TORCH=torch==2.12.0 what to install in .venv if PYTHON has no torch"

build: build/ready  ## Build the extension and install the package with what the tests need

tour: build/ready  ## Run the notebook's cells and print what they show
	@$(PY) notebooks/run.py notebooks/whirlwind_tour.ipynb

notebooks: build/ready  ## Run every notebook and print their times; pictures and what they print go into build/notebooks
	@$(PY) notebooks/run.py notebooks/*.ipynb --figures build/notebooks

test: build/ready  ## Run the tests on all processors; ARGS="-k vmap" selects
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto tests/ $(ARGS)

# The packages go beside the torch that is there. Where their torchvision does not fit it, they do without.
clients: build/ready  ## Install Opacus, curvlinops, TorchOpt, laplace-torch and GPyTorch into .venv-clients, and run their tests
	@test -x .venv-clients/bin/python || $(PY) -m venv .venv-clients
	@$(PY) -c 'import site; [print(f"import site; site.addsitedir({d!r})") for d in site.getsitepackages()]' \
	  > "$$(.venv-clients/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	@echo "torch==$(TORCH_VERSION)" > build/constraints.txt
	.venv-clients/bin/python -m pip install -q -c build/constraints.txt -r tests/clients/requirements.txt
	@.venv-clients/bin/python -c 'import torchvision' 2>/dev/null || .venv-clients/bin/python -m pip uninstall -qy torchvision
	@OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest tests/clients $(ARGS)

lint: build/ready  ## Check format, style and types
	@$(PY) -c 'import clang_format, mypy, ruff' 2>/dev/null || $(PY) -m pip install --no-build-isolation -e '.[lint]'
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -c "from clang_format import clang_format; clang_format()" --dry-run -Werror $(filter csrc/%,$(SOURCES))

docs: build/ready  ## Build the documentation site into build/docs; runs the notebooks that have changed (not with ARGS="-D nb_execution_mode=off")
	@$(PY) -c 'import furo, myst_nb' 2>/dev/null || $(PY) -m pip install --no-build-isolation -e '.[docs]'
	$(PY) -m sphinx -n -W --keep-going -d build/doctrees $(ARGS) docs build/docs

bench: build/ready  ## Measure overhead, small problems, growth, batching rules, linearize, memory, modules, attention, per-sample gradients, partitions, compiled steps and compiled transforms
	@$(PY) benchmarks/overhead.py
	@$(PY) benchmarks/small.py
	@$(PY) benchmarks/growth.py
	@$(PY) benchmarks/rules.py
	@$(PY) benchmarks/linearize.py
	@$(PY) benchmarks/memory.py
	@$(PY) benchmarks/modules.py
	@$(PY) benchmarks/attention.py
	@$(PY) benchmarks/per_sample.py
	@$(PY) benchmarks/partition.py
	@$(PY) benchmarks/compile_memory.py
	@$(PY) benchmarks/compile.py
	@$(PY) benchmarks/torch_compile.py

clean:  ## Remove what was built, and .venv
	rm -rf build docs/notebooks .venv .venv-clients *.egg-info functorch_lite/*.so functorch_lite/_built_for.py
	find . -name __pycache__ -prune -exec rm -rf {} +

# One line for each file that is compiled; everything else is in the log.
build/ready: $(SOURCES) $(if $(filter .venv/%,$(PY)),$(VENV_READY))
	@mkdir -p build
	@echo "Building functorch_lite with $$($(PY) --version): takes about a minute. The whole log is build/install.log."
	@$(PY) -c 'import setuptools, wheel, ninja' 2>/dev/null || $(PY) -m pip install setuptools wheel ninja
	@$(PY) -m pip install -v --no-build-isolation -e '.[test]' 2>&1 | tee build/install.log \
	  | sed -unE 's|^ *(\[[0-9]+/[0-9]+\]).*/build/units/([^ ]+)\.o .*|  \1 \2|p; /^ *(Collecting|Downloading|Successfully)/p' \
	  || { grep -E 'error|Error' build/install.log | head -20; tail -5 build/install.log; exit 1; }
	@echo "$(PY) $$($(call TORCH_OF,$(PY)))" > $@

$(VENV_READY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ". Choose another: make PYTHON=python3.12 ...")'
	@echo "$(PYTHON) has no torch between 2.11 and 2.13, so $(TORCH) goes into .venv (a download of some hundred MB)."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(TORCH) numpy setuptools wheel ninja
	@$(call TORCH_OF,.venv/bin/python) > $@
