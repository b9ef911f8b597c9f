# Two commands to know: `make demo` and `make test`. Each target is self-sufficient: it makes .venv, installs, builds and runs.
# The build is kept in .venv and in the Rust target folder, and done again only when a source changed.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON      ?= python3
BIN         := .venv/bin
PIP         := $(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
RUST        := meshlib/_native
RUST_FILES  := $(shell find $(RUST)/core $(RUST)/wire $(RUST)/proxy $(RUST)/binding -name '*.rs' -o -name Cargo.toml) $(RUST)/Cargo.toml $(RUST)/Cargo.lock
SCRIPT      ?= all
ROUNDS      ?= 5
INTEROP     ?=

help: ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

# --- the environment, in three layers: what runs, what tests, what was built

.venv/run: .ci/run.in .ci/constraints.txt
	@echo "== environment (.venv; about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit("meshlib needs Python 3.11 or newer, this is %s: set PYTHON=" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@command -v cargo >/dev/null || { echo "meshlib is built with Rust: install rustup (cargo 1.85 or newer) first"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -r .ci/run.in
	@touch $@

.venv/test: .ci/test.in .ci/constraints.txt .venv/run
	@echo "== test dependencies (.venv; about a minute)"
	@$(PIP) -r .ci/test.in
	@touch $@

.venv-peers/made: .ci/peers.in
	@echo "== peers that can't stand beside others (.venv-peers; about a minute)"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/pip install --quiet --disable-pip-version-check -r .ci/peers.in
	@touch $@

.venv/built: pyproject.toml .venv/run $(RUST_FILES)
	@echo "== native core (release; some minutes the first time)"
	@PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/maturin develop --release --locked
	@$(PIP) --no-deps --no-build-isolation -e integrations/aiohttp -e integrations/celery -e integrations/consul -e integrations/django -e integrations/etcd -e integrations/fastapi -e integrations/flask -e integrations/redis -e integrations/requests -e integrations/spiffe
	@touch $@

build: .venv/built ## build the native core and install meshlib into .venv

# --- what people run

demo: .venv/built ## a shop under load: a process is killed, nothing fails (DEMO_SECONDS=45)
	@$(BIN)/python -m examples.shop

test: .venv/built .venv/test .venv-peers/made ## everything that CI checks
	@.ci/test

bench: .venv/built .venv/test .venv-peers/made ## measure: SCRIPT=client ROUNDS=5; without SCRIPT all, briefly
	@$(BIN)/python -m benchmarks $(if $(filter all,$(SCRIPT)),--brief,$(SCRIPT) --rounds $(ROUNDS))

interop: .venv/built .venv/test ## gRPC's scenarios with the peers of grpc-go and grpc-java, both ways (INTEROP="--json FILE")
	@$(BIN)/python -m tests.interop $(INTEROP)

lint: .venv/built .venv/test ## ruff, mypy --strict, stubtest, clippy, rustfmt
	@.ci/test lint

fmt: .venv/test ## format Python and Rust
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix . || true
	@cd $(RUST) && cargo fmt --all

wheel: .venv/test ## build wheel and sdist, and try the wheel in a clean environment without Rust
	@.ci/wheel

audit: .venv/test ## licences, bans and sources; advisories where their database can be reached
	@.ci/audit

constraints: .venv/built .venv/test ## write the versions in use as the ones that CI installs
	@$(BIN)/pip freeze --exclude-editable --exclude meshlib-servicemesh | grep -v ' @ ' > .ci/constraints.txt

clean: ## remove what was built and installed
	@rm -rf .venv .venv-peers .interop dist $(RUST)/target meshlib/_native/*.so

.PHONY: help build demo test bench interop lint fmt wheel audit constraints clean
