# VENV: the environment to use; made if missing. One of yours keeps every version that it has.
# PYTHON: what makes a new environment.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
WORKERS ?= 2
# STEPS: of gpu-check; none: all.
STEPS ?=
DATA ?= datasets

.PHONY: setup test test-slow quickstart ablation ablation-real gpu-check lint clean

setup:
	@$(PYTHON) tools/install.py --venv $(VENV)

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: setup
	$(PY) -m pytest -m slow

quickstart: setup
	$(PY) tools/quickstart.py

# Hours, in runs of at most 15 minutes; run again to continue. ARGS="--max-minutes 30" limits the time.
ablation: setup
	$(PY) tools/ablation.py $(ARGS)

# DATA: the folder that holds nuclei and facades (datasets/README.md). As ablation, for days.
ablation-real: setup
	$(PY) tools/ablation.py --set nuclei --data $(DATA) $(ARGS)
	$(PY) tools/ablation.py --set facades --data $(DATA) $(ARGS)

# Ten minutes on a GPU. STEPS="kernels tests" does a part.
gpu-check: setup
	$(PY) tools/gpu_check.py $(STEPS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/config_reference.py --check
	$(PY) -m mypy

# Keeps the environment, data sets and outputs.
clean:
	rm -rf build dist *.egg-info detectron2_lite/build detectron2_lite/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
