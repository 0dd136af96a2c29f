# Two commands matter on a fresh machine: `make demo` and `make test`. The rest is listed by `make help`.
PYTHON ?= python3
STATE ?= state
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo up bench bench-gateway bench-audit bench-receipts bench-reconcile bench-year bench-week sim test test-ui fuzz audit sbom test-postgres test-scale check lint types imports lock clean
help:  ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)  ## the main job, end to end, into STATE (default: state)
	$(BIN)/render-platform demo --state $(STATE)

up: $(READY)  ## gateway, ClickHouse bridge, Dagster and a sample load over STATE, in one terminal
	$(BIN)/render-platform up --state $(STATE)

bench: $(READY)  ## flushes beside their bare limit, on SQLite and PostgreSQL, folder and S3 (half an hour)
	$(BIN)/python -m benchmarks.whole --write

bench-gateway: $(READY)  ## the gateway against its limits and its peers (needs wrk and npm; some minutes)
	$(BIN)/python -m benchmarks.gateway --write

bench-audit: $(READY)  ## verification, appends and proofs beside pymerkle and a naive design (some minutes)
	$(BIN)/python -m benchmarks.audit --write

bench-receipts: $(READY)  ## how long a receipt takes while everything runs under load (seven minutes)
	$(BIN)/python -m benchmarks.receipts --write

bench-year: $(READY)  ## a year of hours written, then reconciled in one backfill of Dagster runs (an hour or two)
	$(BIN)/python -m benchmarks.year --write

bench-reconcile: $(READY)  ## the verdict on an hour beside the bare engines and datacompy (some minutes)
	$(BIN)/python -m benchmarks.reconcile --write

bench-week: $(READY)  ## a week of load, compressed: what storage and memory become (an hour)
	$(BIN)/python -m benchmarks.week --write

SEEDS ?= 1000
sim: $(READY)  ## the whole pipeline simulated: SEED=7 one seed, step by step; SEEDS=10000 so many, from FIRST on
	PYTHONHASHSEED=0 $(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --first $(or $(FIRST),0))

test: check  ## everything that must pass
	$(BIN)/python -m pytest

ON_POSTGRES := $(addprefix tests/,$(addprefix test_,outbox.py outbox_pruning.py sealing.py hours.py audit_log.py \
  audit_log_stops.py late_events.py recovery.py restore_drill.py receipts.py erasure.py charging.py) faults \
  $(addprefix gateway/test_,store.py engine.py recovery.py routes.py writer.py ingest.py identity.py) \
  $(addprefix test_dagster_,postgres.py layer.py runs.py schedule.py ticks.py orphans.py backfills.py) test_housekeeping.py)
test-scale: $(READY)  ## three gateways, two flushers, PostgreSQL, SeaweedFS and the bridge, one of each killed (some minutes)
	RENDER_TEST_SCALE=yes $(BIN)/python -m pytest -s -rs tests/scale

test-postgres: $(READY)  ## the suites of outbox, jobs, log and Dagster on PostgreSQL (needs Debian's postgresql)
	RENDER_TEST_DATABASE=postgres $(BIN)/python -m pytest tests/test_postgres.py $(ON_POSTGRES)

CHROMIUM ?= /usr/bin/chromium
test-ui: $(READY)  ## what a person does in Dagster's UI and on the gateway's page, in Chromium (some minutes)
	@test -x $(CHROMIUM) || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	  || { echo "test-ui needs Chromium: as root, apt-get install chromium; or set CHROMIUM=/path" >&2; exit 1; }
	RENDER_TEST_UI=yes CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest tests/ui

SECONDS ?= 600
fuzz: $(READY)  ## every parser of outside bytes with damaged input, for SECONDS of CPU time
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

TOOLS := .tools
$(TOOLS)/.ready: requirements-tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-tools.txt
	@touch $(TOOLS)/.ready

SERVICE ?= pypi
audit: $(TOOLS)/.ready  ## known vulnerabilities of what is pinned (needs the Internet; SERVICE=osv asks OSV)
	$(TOOLS)/bin/python tests/supply_chain.py audit --service $(SERVICE)

SBOM ?= sbom.json
sbom: $(READY) $(TOOLS)/.ready  ## the bill of materials of what is installed, CycloneDX 1.6, into SBOM
	$(TOOLS)/bin/python tests/supply_chain.py sbom $(SBOM)

check: lint types imports  ## ruff, strict typing, import direction

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

lock: $(READY)  ## pin and hash requirements.in and -tools.in again (needs uv)
	uv pip compile --quiet --no-strip-extras --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 requirements.in -o requirements.txt
	uv pip compile --quiet --no-strip-extras --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 requirements-tools.in -o requirements-tools.txt

clean:  ## remove the environment and caches; never the state
	rm -rf .venv .tools build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
