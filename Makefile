PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

demo: $(VENV)/installed  ## nothing -> a trained picture search in outputs/demo
	OMP_NUM_THREADS=$$(nproc) $(BIN)/nrccr train --recipe demo

test: $(VENV)/installed  ## the fast suite
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@start=$$(date +%s); $(PYTHON) -m venv $(VENV) \
		&& $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]" \
		&& echo "installed in $$(($$(date +%s) - start)) s" && touch $@

clean:
	rm -rf $(VENV) outputs
