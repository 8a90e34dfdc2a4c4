# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Loader and helper processes share the cores with training: waiting threads must not spin.
export OMP_WAIT_POLICY ?= passive

.PHONY: install quickstart test lint golden clean

install: $(BIN)/.installed
$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

# Train the tiny model on synthetic scenes, score it on held-out ones, draw its masks.
quickstart: install
	$(BIN)/mmseg-llm data synthetic --level flat-96 --output data/synthetic/flat-96 --train 6000 --val 64 --test 300
	$(BIN)/python tools/train.py fit --config configs/quickstart.yaml --overwrite true
	$(BIN)/python tools/evaluate.py --checkpoint runs/quickstart --data configs/data/synthetic_flat96.yaml --output runs/quickstart/scores.json
	$(BIN)/python tools/predict.py --checkpoint runs/quickstart --image data/synthetic/flat-96/images/test_000003.png \
		--query "the red circle" --query "the leftmost shape" --output runs/quickstart/predictions

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check mmseg_llm tools tests
	$(BIN)/ruff format --check mmseg_llm tools tests
	$(BIN)/mypy

golden: install
	$(BIN)/pytest -m golden -q -s # prints the errors

clean:
	rm -rf $(VENV) build dist *.egg-info
