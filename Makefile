# Everything from a clean clone needs only Python 3.11 or newer, with its venv and pip, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
INSTALLED := $(VENV)/.installed
LIBTPU := $(VENV)/tpu/.installed
MKDOCS := $(VENV)/.mkdocs-installed
# What a machine with JAX, Flax, optax, orbax, PyTorch and the usual scientific packages lacks.
WHEELS := array-record dm-tree docstring-parser googleapis-common-protos grain immutabledict importlib-resources mlxtend \
  mnist1d portpicker simple-parsing tensorflow-datasets tensorflow-metadata termcolor toml typeguard tyro
WHEELS_PYTHON ?= 3.12
# Not --quiet, which hides warnings from --strict, too. The variable silences what Material announces about its future.
BUILD_SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: install tpu docs serve demo comparison figures notebooks test soak package lint types benchmark gpu wheels lock clean

install: $(INSTALLED)

tpu: $(LIBTPU) ## libtpu, for the tests that compile for TPUs; beside the environment, where JAX would look for TPUs.

docs: $(MKDOCS) ## The documentation, as a site in site/; a warning is an error, as two planted dead links show.
	$(BUILD_SITE)
	echo '{INHERIT: mkdocs.yml, hooks: [docs/dead_links.py, docs/hooks.py]}' | \
	  $(BUILD_SITE) --config-file - --site-dir $(VENV)/site-with-dead-links 2>&1 | grep -q "Aborted with 2 warnings" || \
	  { echo "two planted dead links did not fail the build of the site"; exit 1; }

serve: $(MKDOCS) ## The documentation in a browser, built again when a page changes.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

demo: $(RUNTIME) ## The main job: LSGD and its peers on the embedded data, with a table and a picture.
	$(BIN)/lsgd compare mnist1d --groups 1 --methods lsgd,easgd,local_sgd,data_parallel,independent \
	  --steps 1200 --eval-every 100 --seeds 0..1 --out runs/demo

comparison: $(RUNTIME) ## The committed comparisons, tuned, 8 seeds, at 4 and 16 workers: about three hours on two cores.
	$(BIN)/lsgd compare mnist1d --dataset mnist1d-10k --groups 1 --workers 4 --steps 2000 --eval-every 100 \
	  --seeds 0..7 --tune --out runs/mnist1d-4
	$(BIN)/lsgd compare mnist1d --dataset mnist1d-10k --groups 1 --workers 16 --steps 800 --eval-every 80 \
	  --seeds 0..7 --tune --out runs/mnist1d-16

figures: $(RUNTIME) ## The paper's analytic figures and the table of its claims, where their results are committed.
	$(BIN)/lsgd figure analytic --out benchmarks/paper/results
	$(BIN)/lsgd figure theory --out benchmarks/paper/results --runs benchmarks/paper/results

test: lint types tpu ## Lint, types, tests and notebooks.
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(INSTALLED) ## Many more kills, damaged folders and trees than the tests try, summed up in benchmarks/reliability/results.
	LSGD_SOAK=1 $(BIN)/pytest -n 2 tests/reliability

notebooks: $(INSTALLED) ## Renew the notebooks and their outputs from their paired scripts.
	$(BIN)/jupytext --update --to ipynb notebooks/*.py
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN notebooks/*.ipynb

package: $(INSTALLED) ## A wheel and an sdist, each installed into an empty environment and run there, on PYTHON.
	rm -rf dist
	$(BIN)/uv build --quiet
	for package in "$$PWD"/dist/*.whl "$$PWD"/dist/*.tar.gz; do \
	  empty=$$(mktemp -d) && $(BIN)/uv venv --quiet --python $(PYTHON) "$$empty/venv" && \
	  $(BIN)/uv pip install --quiet --python "$$empty/venv" "$$package" && \
	  (cd "$$empty" && venv/bin/lsgd compare digits --methods lsgd,easgd --seeds 0 --steps 100) && \
	  rm -rf "$$empty" || exit 1; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

benchmark: $(INSTALLED) ## What an exchange costs.
	$(BIN)/python -m benchmarks.speed.exchange

gpu: $(INSTALLED) ## What works and what it costs on one NVIDIA GPU, in 9.5 minutes at most; see benchmarks/gpu/README.md.
	$(BIN)/python -m benchmarks.gpu

wheels: $(INSTALLED) ## What the GPU check imports beyond JAX, Flax, optax and PyTorch, for a machine without a network.
	rm -rf .wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest .wheels --constraint requirements.txt \
	  --no-deps --only-binary=:all: --implementation cp --python-version $(WHEELS_PYTHON) \
	  $(addprefix --platform manylinux_2_,28_x86_64 27_x86_64 17_x86_64) --platform manylinux2014_x86_64 $(WHEELS)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --wheel-dir .wheels --constraint requirements.txt \
	  --no-deps promise # Pure Python, of which there is only the source.
	du -sh .wheels

lock: $(INSTALLED) ## Renew requirements.txt, requirements-tpu.txt and requirements-docs.txt from pyproject.toml.
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --upgrade --quiet \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" -o requirements.txt
	$(BIN)/uv pip compile pyproject.toml --extra tpu --universal --python-version 3.11 --quiet \
	  --no-annotate --constraint requirements.txt | grep ^libtpu > requirements-tpu.txt
	$(BIN)/uv pip compile --group docs --universal --python-version 3.11 --upgrade --quiet \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --constraint requirements.txt \
	  -o requirements-docs.txt

clean:
	rm -rf $(VENV) site

# What running the package needs; its modules are compiled when they are first imported, since most never are.
$(RUNTIME): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lsgd_jax needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint requirements.txt --editable .
	touch $@

# What developing it needs, too.
$(INSTALLED): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(LIBTPU): requirements-tpu.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) -r $<
	touch $@

$(MKDOCS): requirements-docs.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
