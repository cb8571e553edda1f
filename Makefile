# Two commands do everything: `make embed` runs the main job, `make test` passes the tests. Each sets up what it needs.
# CI also runs `make test-proofs`: kernels without their hardware, in an interpreter, emulators and sanitizers, and `qualify`.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
# The longest first, so that none is left to one process at the end.
PROOFS := tests/gpu/test_triton.py tests/cpu/test_sanitizers.py tests/cpu/test_amx.py tests/gpu tests/ops/test_qualify.py
PYTEST = $(BIN)/pytest --numprocesses 2 --dist loadfile
# pip would compile 17,000 files of packages on one core, for over a minute; what does not compile is never imported.
PIP = $(BIN)/pip install --quiet --no-compile
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(CURDIR)/.venv/lib || true

.PHONY: embed test test-proofs lint docs bench proof attack gpu-report compat clean

embed: .venv/core
	mkdir -p out
	$(BIN)/esm-fast embed examples/uniprot_sample.fasta.gz -o out/uniprot_sample.h5 --overlength window --force

test: .venv/test
	$(PYTEST) $(PROOFS:%=--ignore=%)

test-proofs: .venv/test
	$(PYTEST) --no-loadscope-reorder $(PROOFS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The site, in out/site: pages, tutorials, and the API from its docstrings.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Full-size ESM-1b against its peers, side by side: about 8 GB of packages, 16 GB of memory, an hour.
bench: .venv/bench
	mkdir -p out
	$(BIN)/pytest benches/test_tokenize.py --benchmark-json out/bench.json
	$(BIN)/python benches/bench_ops.py --json out/ops.json
	$(BIN)/python benches/bench_peers.py --profile --out out/peers
	$(BIN)/python benches/bench_train.py --out out/train

# Compiles every Triton and CUDA kernel for every architecture and runs Triton's in its interpreter, without a GPU; after
# a change to a kernel, this renews the tables that tests compare with. Tens of minutes if all has changed.
proof: .venv/test
	$(BIN)/python tests/proof/triton_proof/audit.py
	$(BIN)/python tests/proof/triton_proof/matrix.py
	$(BIN)/python tests/proof/cuda_proof/audit.py
	PYTHONPATH=tests/proof:tests/support $(BIN)/python -m cuda_proof.loops

# Kills, flipped bits, hostile files, calls and servers by chance, as often as docs/reliability.md says: some ten minutes.
# One of them: make attack ATTACK=kills.
attack: .venv/test
	PYTHONPATH=tests/proof:tests/support $(BIN)/python -m attack $(ATTACK)

# For whoever has a GPU: is everything right on it, and how fast. It needs torch and the built package, no network; each
# part is a process of its own, and the same command resumes. What to run first: make gpu-report REPORT="--only smoke correct".
# `make gpu-report REPORT=--dry-run` shows without a GPU that it works.
gpu-report:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benches/gpu_report.py $(REPORT)

# The oldest versions that pyproject.toml allows, in an environment of its own: imports, ops, Triton's machine code for
# sm_90 and its interpreter. Some 5 GB of packages; nothing of them is kept elsewhere.
compat: .venv/compat/done
	.venv/compat/bin/python tests/proof/compat.py

.venv/compat/done: pyproject.toml
	$(PYTHON) -m venv .venv/compat
	.venv/compat/bin/pip install --quiet "torch==2.10.*" "triton==3.6.*" "numpy>=2,<2.4" pytest hypothesis ml_dtypes
	.venv/compat/bin/pip install --quiet --editable .
	touch $@

.venv/core: $(SOURCES) | .venv/bin/pip
	$(PIP) --editable .
	$(COMPILE)
	touch $@

.venv/test: $(SOURCES) | .venv/bin/pip
	$(PIP) --editable '.[test]'
	$(COMPILE)
	touch $@ .venv/core

.venv/docs: $(SOURCES) | .venv/bin/pip
	$(PIP) --editable '.[docs]'
	$(COMPILE)
	touch $@ .venv/core

.venv/bench: $(SOURCES) | .venv/bin/pip
	$(PIP) --editable '.[test,bench]'
	$(COMPILE)
	touch $@ .venv/core .venv/test

.venv/bin/pip:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build out
