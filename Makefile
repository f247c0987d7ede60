# Everything from a clean clone needs only Python 3.11 or newer, with its venv and pip, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo figures test lint types benchmark lock clean

install: $(INSTALLED)

demo: $(INSTALLED) ## The main job: LSGD on the embedded data, with its picture.
	$(BIN)/lsgd train mnist1d

figures: $(INSTALLED) ## The paper's analytic figures, where their results are committed.
	$(BIN)/lsgd figure analytic --out benchmarks/paper/results

test: lint types ## Lint, types and tests.
	$(BIN)/pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

benchmark: $(INSTALLED) ## What an exchange costs.
	$(BIN)/python -m benchmarks.speed.exchange

lock: $(INSTALLED) ## Renew requirements.txt from pyproject.toml.
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --upgrade --quiet \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" -o requirements.txt

clean:
	rm -rf $(VENV)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lsgd_jax needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
