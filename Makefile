# Needs python >= 3.11, make and git; installs the rest into .venv (and Postgres by apt, when root, for the tests).
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test llama bench bench-peers chaos lint types lock schema components clean
.DEFAULT_GOAL := demo

$(READY): requirements.lock pyproject.toml .ci/venv
	@.ci/venv $(VENV)

demo: $(READY)        ## watch the quick start work, from nothing to a captured reply
	@$(BIN)/python -m examples.demo

test: $(READY)        ## the whole suite, on the embedded Postgres and on the system's
	@.ci/test $(BIN)/python $(ARGS)

llama: $(READY)       ## builds llama.cpp's server into .llama, which takes minutes, and runs the tests that want it
	@test -x .llama/bin/python || { $(BIN)/python -m venv .llama && .llama/bin/pip install --quiet "llama-cpp-python[server]" gguf; }
	@$(BIN)/python -m pytest tests/test_llama.py

bench: $(READY)       ## all benchmarks, or one: make bench BENCH=name
	@.ci/postgres
	@$(BIN)/python -m benchmarks $(BENCH)

bench-peers: $(READY) ## Anton and five other Postgres queues side by side; installs those, needs npm and 15 minutes
	@.ci/postgres
	@$(BIN)/python -m benchmarks.peers $(ARGS)

chaos: $(READY)       ## kills, crashes and lost replies, counted: make chaos ARGS="--minutes 10 --seed 7", or of one kind: ARGS=P1
	@.ci/postgres
	@$(BIN)/python -m chaos $(ARGS)
	@[ -n "$(ARGS)" ] || $(BIN)/python -m chaos.outbox --calls 100 --save

lint: $(READY)
	@$(BIN)/ruff check .

types: $(READY)
	@$(BIN)/mypy -p anton -p anton_components -p chaos

lock: $(READY)        ## pins every dependency anew; needs python 3.11, see CONTRIBUTING
	@$(BIN)/pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --no-strip-extras --no-header --no-emit-options \
	  --extra web --extra embedded --extra files --extra llm --extra rss --extra dbt --extra test --extra dev --output-file requirements.lock pyproject.toml

schema: $(READY)      ## anton/autonomous.schema.json, from anton/config.py; the table of docs/verify.md, from anton/verify.json
	@$(BIN)/python -c "import json; from anton import config; print(json.dumps(config.json_schema(), indent=2))" > schema.tmp
	@mv schema.tmp anton/autonomous.schema.json
	@$(BIN)/python tests/test_docs_verify.py

components: $(READY)  ## docs/components/, from the components' docstrings
	@PYTHONPATH=components:tests $(BIN)/python tests/test_installed.py

clean:                ## what make and the tools made; the embedded database in .anton stays
	@rm -rf $(VENV) .llama build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +
