# Needs make and Python 3.11 or newer; everything else goes into .venv. Each install leaves a stamp there, so that a
# second run starts at once; a changed pyproject.toml or setup.py installs again.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The first of these that runs and is new enough (a pyenv shim of a missing version exists but does not run).
PYTHON ?= $(firstword $(foreach python,python3 python3.12 python3.13 python3.11 python3.14,\
	$(shell $(python) -c 'import sys; sys.version_info >= (3, 11) and print("$(python)")' 2>/dev/null)))

# Options for the server, as in: make serve ARGS="--http-port 9000 --log-verbose 1"
ARGS ?=
# Options for pytest, as in: make test TESTS="tests/unit -k settings"
TESTS ?=
# Files that are tested side by side; fixtures are shared within a file. PARALLEL= runs one after the other.
PARALLEL ?= -n 3 --dist loadfile

# What is checked and formatted; a folder that a checkout lacks is left out.
SOURCES := setup.py $(wildcard engine frontend ipc conf tests bench examples)

.DEFAULT_GOAL := help

help:  ## Print this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/' | expand -t 20

serve: $(VENV)/.installed  ## Serve the example repository conf/models on ports 8000 (HTTP), 8001 (gRPC), 8002 (metrics)
	@exec $(BIN)/forebay serve --model-repository conf/models $(ARGS)

demo: $(VENV)/.installed-demo  ## Serve on free ports, send requests, check the answers, print latencies
	@exec $(BIN)/python -m forebay.engine.demo $(ARGS)

install: $(VENV)/.installed  ## Create .venv and install forebay into it

gpu: $(VENV)/.installed  ## Add what a machine with an NVIDIA GPU needs (about 1.7 GB)
	$(PIP) install -e '.[gpu]'
	$(GPU_BUILD_ON_TOP)

test: $(VENV)/.installed-test  ## Install what the tests need and run them
	@# What fails beside other files on two busy cores gets a second try alone; a real failure fails there too.
	$(BIN)/python -P -m pytest $(PARALLEL) $(TESTS) || { echo "once more, by themselves:"; \
		$(BIN)/python -P -m pytest --last-failed --last-failed-no-failures=none $(TESTS); }

fuzz: $(VENV)/.installed-test  ## Send malformed requests to a running server for some minutes
	FOREBAY_FUZZ_EXAMPLES=5000 $(BIN)/python -P -m pytest -q -n0 tests/faults/test_http_fuzz.py

storm: $(VENV)/.installed-test  ## Cancel, leave and kill at random, beside clients of all kinds, for some minutes
	FOREBAY_STORM_SECS=180 $(BIN)/python -P -m pytest -q -n0 -s tests/faults/test_storm.py

test-gpu: $(VENV)/.installed-test  ## On a machine with an NVIDIA GPU, after `make gpu`: every test that needs one
	@# The tests are written for one GPU; another than the first may be named in the environment.
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -P -m pytest -n 0 -m gpu -ra --continue-on-collection-errors $(TESTS)

format: $(VENV)/.installed-test  ## Format the code and sort its imports
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix --select I $(SOURCES)

format-check: $(VENV)/.installed-test
	$(BIN)/ruff format --check --diff $(SOURCES)

lint: $(VENV)/.installed-test  ## Run ruff
	$(BIN)/ruff check $(SOURCES)

reference: $(VENV)/.installed  ## Renew docs/flags.md and conf/forebay.toml after a change of a flag or setting
	mkdir -p docs
	$(BIN)/python -m forebay.engine.command_line --markdown > docs/flags.md
	$(BIN)/python -m forebay.engine.command_line --toml > conf/forebay.toml

typecheck: $(VENV)/.installed-test build/typing/forebay/client  ## Run mypy and pyright, both strict
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

check: format-check lint typecheck test  ## Everything that CI runs

clean:  ## Remove .venv, build output and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- what the targets above need

# Both builds of ONNX Runtime own one directory, and pip knows nothing of it: every install brings the CPU build's files
# back over those of the GPU build. Where there is one, it goes on top again.
define GPU_BUILD_ON_TOP
@if $(PIP) show --quiet onnxruntime-gpu 2>/dev/null && $(PIP) show --quiet onnxruntime 2>/dev/null; then \
	$(PIP) uninstall --quiet --yes onnxruntime && $(PIP) install --quiet --force-reinstall --no-deps onnxruntime-gpu; fi
endef

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "forebay needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml setup.py engine/worker/rows_lane.c frontend/client/glance_loop.c | $(BIN)/python
	$(PIP) install --quiet -e .
	$(GPU_BUILD_ON_TOP)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	$(PIP) install --quiet -e '.[demo]'
	$(GPU_BUILD_ON_TOP)
	@touch $@

# PyTorch, TensorFlow and OpenVINO are large, so only CI fetches them unasked; without it the tests that need it are skipped, saying so.
# silero-vad comes for its ONNX file; its own dependencies would bring PyTorch.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet -e '.[test]'
	$(PIP) install --quiet --no-deps silero-vad
ifeq ($(CI),true)
	$(PIP) install --quiet torch==2.13.0 tensorflow-cpu openvino
endif
	$(GPU_BUILD_ON_TOP)
	@touch $@ $(VENV)/.installed-demo

# mypy and pyright cannot see through an editable finder: give them one link that spells the name.
build/typing/forebay/client: $(wildcard frontend/*)
	rm -rf build/typing/forebay && mkdir -p build/typing/forebay/frontend
	cd build/typing/forebay && ln -s ../../../engine ../../../ipc ../../../conf ../../../engine/package/__init__.py .
	cd build/typing/forebay && ln -s ../../../frontend/client client
	@# The client is a package of its own: under frontend as well it would be checked as two.
	cd build/typing/forebay/frontend && ln -s $(addprefix ../../../../,$(filter-out frontend/client,$(wildcard frontend/*))) .

.PHONY: help serve demo install gpu test test-gpu fuzz storm format format-check lint reference typecheck check clean
