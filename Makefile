# make demo | test | test-all | seconds | lint | kernels-check | wheels | gpu | clean; each makes .venv and installs
# what it needs. PYTHON=/path/to/python3.12 chooses the interpreter, TESTS=tests/engine a part of the tests.
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS ?= results
CONSTRAINTS ?= constraints.txt
PIP = python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-ci test-all test-generated seconds lint clean install peers peers-ledger peers-kvpress \
	kernels-check kernels-check-newest kernels-check-oldest wheels gpu

demo: $(VENV)/.installed
	$(BIN)/kvlab run -m experiment=demo results_dir=$(RESULTS)
	$(BIN)/kvlab report $(RESULTS)/demo

# tests/tiers.py sorts tests into tiers, by what they take. test-all takes all but the generated cases of kernels, which
# take an hour of their own.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) $(TESTS)

test-ci: $(VENV)/.installed
	$(PYTEST) -m ci $(TESTS)

test-all: $(VENV)/.installed
	$(PYTEST) -m 'not generated' $(TESTS)

test-generated: $(VENV)/.installed
	$(PYTEST) -m generated $(TESTS)

# What tests take, by which they are sorted into tiers: of all that TESTS names, added to what is known. Hours for all.
seconds: $(VENV)/.installed
	$(PYTEST) --seconds-to tests/seconds.json -o timeout=1800 -m 'not generated' $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) .ci/find_python.sh
	@python="$$(PYTHON='$(PYTHON)' sh .ci/find_python.sh)" && "$$python" -m venv $(VENV)
	$(BIN)/$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

PEERS_FIND = $${PEERS_PYTHON:-$$(sh .ci/find_python.sh 3.11 || sh .ci/find_python.sh)}

# PyTorch for benchmarks/ lives apart; under Python 3.11 it comes as a CPU build.
peers: .peers/.installed

.peers/.installed: benchmarks/peers.txt
	@python="$(PEERS_FIND)" && "$$python" -m venv .peers
	.peers/bin/$(PIP) -r benchmarks/peers.txt
	@touch $@

# kvpress, for tests/compression/golden: it wants a transformers older than that of the other peers.
peers-kvpress: .peers-kvpress/.installed

.peers-kvpress/.installed: benchmarks/peers_kvpress.txt
	@python="$(PEERS_FIND)" && "$$python" -m venv .peers-kvpress
	.peers-kvpress/bin/$(PIP) -r benchmarks/peers_kvpress.txt
	@touch $@

# vLLM's block manager, for benchmarks/ledger.py: beside PyTorch's CPU build, without its own dependencies.
peers-ledger: .peers-ledger/.installed

.peers-ledger/.installed: benchmarks/peers_ledger.txt .peers/.installed
	@python="$(PEERS_FIND)" && "$$python" -m venv .peers-ledger
	.peers-ledger/bin/$(PIP) --no-deps -r benchmarks/peers_ledger.txt
	@ls -d "$$PWD"/.peers/lib/python*/site-packages > "$$(ls -d .peers-ledger/lib/python*/site-packages)/peers.pth"
	@touch $@

# Compiles every kernel, and every case of the bench, for every chip on a machine that has none: on the newest and the
# oldest allowed jax. The compilers, some 5 GB each, live apart. A part of it: TARGETS="B200 v5e" OLDEST_TARGETS=H200
# DIMS=128, and CASES="0 --lower" (only the named cases, not as far as machine code), or CASES= (none).
CASES ?= 40
OLDEST_CASES ?= $(CASES)
CHECK = -m pallas_kernels.targets $(if $(DIMS),--dims $(DIMS))

kernels-check: kernels-check-newest kernels-check-oldest

kernels-check-newest: .venv-kernels/.installed
	.venv-kernels/bin/python $(CHECK) $(if $(CASES),--cases $(CASES)) -- $(TARGETS)
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 .venv-kernels/bin/python -m kvlab.lab.absent H200 gqa mla hybrid

kernels-check-oldest: .venv-kernels-oldest/.installed
	.venv-kernels-oldest/bin/python $(CHECK) $(if $(OLDEST_CASES),--cases $(OLDEST_CASES)) -- $(OLDEST_TARGETS)

.venv-kernels/.installed: pallas_kernels/compilers.txt pyproject.toml .ci/find_python.sh
	@python="$$(PYTHON='$(PYTHON)' sh .ci/find_python.sh)" && "$$python" -m venv .venv-kernels
	.venv-kernels/bin/$(PIP) -c constraints.txt -r pallas_kernels/compilers.txt -e .
	@touch $@

# What GPU machines have: jax alone, for pallas_kernels needs nothing else.
.venv-kernels-oldest/.installed: .ci/compilers-oldest.txt .ci/constraints-oldest.txt .ci/find_python.sh
	@python="$$(PYTHON='$(PYTHON)' sh .ci/find_python.sh)" && "$$python" -m venv .venv-kernels-oldest
	.venv-kernels-oldest/bin/$(PIP) -c .ci/constraints-oldest.txt -r .ci/compilers-oldest.txt
	@touch $@

# What kvlab needs beside what machines with GPUs have, 13 MB, to be carried to one without a network. There:
# python3 -m pip install --no-index --no-deps --target site wheels/*.whl, and site on PYTHONPATH.
CARRIED := hydra-core omegaconf antlr4-python3-runtime plotly pydantic annotated-types typing-inspection
# The one that is compiled: for that machine's Python, on x86-64.
CARRIED_BINARY := pydantic-core
CARRIED_PYTHON ?= 3.12

# The kernels' bench and whole models on the GPU of this machine, by its own Python (PYTHON=python3), in BUDGET seconds
# in all.
BUDGET ?= 540

gpu:
	PYTHON='$(or $(PYTHON),python3)' sh benchmarks/gpu.sh $(BUDGET) $(FOLDER)

wheels: $(VENV)/.installed
	rm -rf wheels
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c $(CONSTRAINTS) -w wheels $(CARRIED)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -c $(CONSTRAINTS) -d wheels \
	    --only-binary=:all: --implementation cp --python-version $(CARRIED_PYTHON) --platform manylinux_2_17_x86_64 \
	    $(CARRIED_BINARY)
	@du -sh wheels

clean:
	rm -rf wheels $(VENV) .venv-oldest .venv-kernels .venv-kernels-oldest .peers .peers-ledger .peers-kvpress \
		build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
