# Two commands to know: `make demo` and `make test`. Both work in a bare clone.
PYTHON ?= python3
VENV ?= .venv
# Where pip finds torch; on a machine without a GPU, for example
# `make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"`.
TORCH_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NODE_INSTALLED := clients/node/node_modules/.package-lock.json
PACKAGES := chunkkv services clients/chunkserve_client tests

.PHONY: demo test check bench needles soak protos format model node-deps install clean

demo: install  ## Start a cluster, ask a long document two questions, show what was saved, stop.
	$(BIN)/chunkserve demo

test: install node-deps  ## Run the whole test suite.
	CHUNKSERVE_TEST_MODEL="$$($(BIN)/python -m services.local.model)" $(BIN)/pytest $(PYTEST_ARGS)

check: install  ## Format, lint, types, import contracts, wire contract, generated code.
	$(BIN)/ruff format --check $(PACKAGES)
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	PATH="$(abspath $(BIN)):$$PATH" scripts/generate_protos.sh --check

bench: install  ## Run the benchmarks; tables on the screen, JSON in bench-results/.
	mkdir -p bench-results
	for name in store compression needle linear decode bounded decode_service sessions; do \
		$(BIN)/python -m tests.benchmarks.bench_$$name --json bench-results/$$name.json || exit 1; \
	done

soak: install  ## Thousands of random steps of sessions, each checked against a model of them.
	CHUNKSERVE_TEST_STEPS=5000 $(BIN)/pytest tests/integration/test_session_properties.py

needles: install  ## The needle table of all presets: hours on a CPU; a run that was cut off goes on.
	$(BIN)/chunkkv eval run needle "$$($(BIN)/python -m services.local.model)" \
		--out bench-results/needles --seed 2026 --samples 40 --set num_needles=1 \
		--tokens 1000 --tokens 2000 --keep-ratio 0.05 --keep-ratio 0.1 --keep-ratio 0.2 \
		--keep-ratio 0.3 --keep-ratio 0.5

protos: install  ## Generate the Python code of protos/ again.
	PATH="$(abspath $(BIN)):$$PATH" scripts/generate_protos.sh

format: install  ## Format the code in place.
	$(BIN)/ruff format $(PACKAGES)
	$(BIN)/ruff check --fix $(PACKAGES)
	$(BIN)/buf format -w

model: install  ## Fetch and convert the demo model; print its folder.
	@$(BIN)/python -m services.local.model

install: $(INSTALLED)  ## Make the environment.

# torch first and alone: what other packages ask of it would bring another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

# The Node client's tests are skipped where there is no Node.
node-deps:
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NODE_INSTALLED); \
	else echo "npm is not installed: the Node client will not be tested"; fi

$(NODE_INSTALLED): clients/node/package-lock.json
	npm ci --prefix clients/node --no-audit --no-fund
	touch $@

clean:  ## Remove the environment and everything generated beside it.
	rm -rf $(VENV) clients/node/node_modules bench-results .mypy_cache .ruff_cache .pytest_cache
