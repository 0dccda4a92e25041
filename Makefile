# Two commands do everything, set-up included: `make run` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# llama.cpp is only a test oracle: -O1 halves the time of compiling it.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1

.PHONY: run test lint bench bench-verify bench-trace trace-models fuzz clean
.DEFAULT_GOAL := run

$(VENV)/.models: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing what the main job needs into $(VENV) (pinned in constraints.txt)"
	@$(PIP) -e '.[models]'
	@touch $@

$(VENV)/.dev: $(VENV)/.models
	@echo "installing what the tests need (llama.cpp is compiled, which takes minutes the first time)"
	@$(PIP) -e '.[models,dev,oracle]'
	@touch $@

run: $(VENV)/.models
	@$(BIN)/steelyard run recipes/quickstart.yaml

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes of one thread each: faster than one of two, and the tests' many subprocesses run side by side.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Beside llama.cpp as its authors build it; the tests' copy is compiled with -O1, in half the time.
$(VENV)/.peer: $(VENV)/.dev
	@echo "compiling llama.cpp as its authors do (minutes, once)"
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" $(PIP) --target $(VENV)/peer --upgrade --no-deps --no-cache-dir \
	  --no-binary llama-cpp-python llama-cpp-python
	@touch $@

bench: bench-inference bench-train bench-scorers bench-statistics bench-safety bench-verify

bench-statistics: $(VENV)/.models
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bounds.py

bench-verify: $(VENV)/.models
	@$(BIN)/python benchmarks/verify.py

bench-%: $(VENV)/.peer
	@$(BIN)/steelyard run recipes/quickstart.yaml --until import >/dev/null
	@PYTHONPATH=$(VENV)/peer $(BIN)/python benchmarks/$*.py $$(ls -td .steelyard/models/import-* | head -1)

# The models that the trace benchmarks look at, built once from the quickstart's (an hour, 6 GB).
trace-models: $(VENV)/.models
	@$(BIN)/steelyard run recipes/quickstart.yaml --until align >/dev/null
	@$(BIN)/python benchmarks/trace_models.py $$(ls -td .steelyard/models/import-* | head -1) \
	  $$(ls -td .steelyard/models/align-* | head -1)/model .steelyard/trace-models

bench-trace: trace-models $(VENV)/.peer
	@$(BIN)/python benchmarks/trace_lineage.py .steelyard/trace-models
	@$(BIN)/python benchmarks/trace_uncensored.py .steelyard/trace-models
	@PYTHONPATH=$(VENV)/peer $(BIN)/python benchmarks/trace_mark.py $$(ls -td .steelyard/models/import-* | head -1) \
	  $$(ls -td .steelyard/models/align-* | head -1)/model $$(find $${STEELYARD_CACHE:-$$HOME/.cache/steelyard} -name '*.gguf' | head -1) \
	  .steelyard/trace-mark --models .steelyard/trace-models

# Coverage-guided, 5 minutes over all parsers of untrusted input; `make fuzz FUZZ=--quick` for 30 s.
$(VENV)/.fuzz: $(VENV)/.dev
	@$(PIP) -e '.[models,dev,oracle,fuzz]'
	@touch $@

fuzz: $(VENV)/.fuzz
	@$(BIN)/python fuzz/run.py $(FUZZ)

clean:
	rm -rf $(VENV) .steelyard releases fuzz/out
