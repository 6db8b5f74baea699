# Everything starts here: `make` lists the targets. Each target that needs the environment makes it first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast lint check format bench-pacs bench-runtime bench-nas bench-ood bench-shift bench-routing
.PHONY: bench-calibration bench-labelfree bench-science bench-fleet bench-fuzz bench-daemon bench-mqtt bench-adaptation bench-page clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS := benchmarks/results
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/edgeear
PACS := $(CACHE)/PACS
DIGITS := $(CACHE)/Digits
# The data set of the bench targets: a folder DOMAIN/CLASS/files.
DATA ?= $(PACS)

# Optional data for tests and benchmarks, where it lies beside the repository.
ifeq ($(origin EDGEEAR_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export EDGEEAR_DATA := $(abspath ../shared/data)
endif
endif

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	  printf '  make %-14s %s\n' "$$name" "$$text"; done

demo: $(STAMP) ## watch a classifier meet new domains, adapt and keep what it knew
	$(BIN)/edgeear demo

# Rooms of which at least 95 % of the lines are run by tests, and the share that is reached of all of them.
COVERED := adaptors edgeear device/board device/mqtt device/state
COVERED_ALL := 96

test: $(STAMP) system ## run the tests and doctests, with coverage; ARGS=tests/edgeear picks some, without
ifdef ARGS
	$(BIN)/python -m pytest -q $(ARGS)
else
	rm -rf .coverage && mkdir .coverage
	$(BIN)/python -m pytest -q --cov --cov-report= --cov-fail-under=$(COVERED_ALL)
	@rm -f .coverage/data.* # of processes that a test killed
	@for room in $(COVERED); do \
	  echo "$$room: $$($(BIN)/coverage report --include="$$room/*" --format=total) % of the lines are tested"; \
	  $(BIN)/coverage report --include="$$room/*" --fail-under=95 --show-missing >.coverage/report || \
	    { cat .coverage/report; exit 1; }; done
endif

test-fast: $(STAMP) ## the tests that need no torch, broker, browser or process: under a minute
	$(BIN)/python -m pytest -q --fast $(ARGS)

lint: $(STAMP) ## style, types and architecture, without running anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests use a real browser and a real broker: installed where that is allowed, asked for where it is not.
.PHONY: system
system:
	@export PATH="$$PATH:/usr/sbin:/usr/local/sbin"; missing=; \
	command -v mosquitto >/dev/null || missing="$$missing mosquitto"; \
	command -v mosquitto_pub >/dev/null || missing="$$missing mosquitto-clients"; \
	command -v chromium >/dev/null || [ -n "$${EDGEEAR_NO_BROWSER:-}" ] || missing="$$missing chromium"; \
	[ -z "$$missing" ] || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
	  else echo "the tests need$$missing: sudo apt-get install$$missing (EDGEEAR_NO_BROWSER=1 does without chromium)"; \
	  exit 1; fi; }

check: lint test ## lint, then test: what has to pass before a change lands

format: $(STAMP) ## rewrite the code in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench-pacs: $(STAMP) | $(RESULTS) $(DATA) ## the continual protocol on PACS: 5 seeds, all images and 20 shots
	@for seed in 0 1 2 3 4; do for shots in all 20; do \
	  option=; if [ $$shots != all ]; then option="--shots $$shots"; fi; \
	  (set -x; $(BIN)/edgeear eval --data "$(DATA)" --order photo,art_painting,cartoon,sketch \
	    --seed $$seed $$option --json $(RESULTS)/pacs-$$shots-seed$$seed.json); done; done

bench-runtime: $(STAMP) | $(RESULTS) ## the whole path against the bare encoder, for 1, 8 and 64 domains
	$(BIN)/edgeear bench runtime --domains 1,8,64 --json $(RESULTS)/runtime.json

NAS_DOMAINS := $(PACS):art_painting $(PACS):cartoon $(PACS):sketch $(DIGITS):mnist_m $(DIGITS):synfont
bench-nas: $(STAMP) | $(RESULTS) $(PACS) $(DIGITS) ## proxies and search against trained heads, five domains; tables are kept
	@for pair in $(NAS_DOMAINS); do (set -x; $(BIN)/edgeear bench nas --data "$${pair%:*}" --domain "$${pair##*:}" \
	  --tables benchmarks/data --only-table --json $(RESULTS)/nas-$${pair##*:}.json); done
	$(BIN)/python -m benchmarks.ranker
	@for pair in $(NAS_DOMAINS); do (set -x; domain="$${pair##*:}"; \
	  $(BIN)/edgeear bench nas --data "$${pair%:*}" --domain "$$domain" --tables benchmarks/data \
	    $$([ "$$domain" != art_painting ] || echo --fidelity 20) --json $(RESULTS)/nas-$$domain.json); done
	$(BIN)/python -m benchmarks.page

bench-ood: $(STAMP) | $(RESULTS) $(DATA) ## the novelty score against published ones, every pair of domains
	$(BIN)/edgeear bench ood --data "$(DATA)" --json $(RESULTS)/ood.json

bench-shift: $(STAMP) | $(RESULTS) $(DATA) ## stated bounds against measured rates, and the shift test against published ones
	$(BIN)/python -m benchmarks.shift --data "$(DATA)" --seeds 5 --json $(RESULTS)/shift.json

bench-routing: $(STAMP) | $(RESULTS) $(DATA) $(DIGITS) ## routing and its time among 1, 8 and 50 real domains
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.routing --pacs "$(DATA)" --digits "$(DIGITS)" --json $(RESULTS)/routing.json

bench-labelfree: $(STAMP) | $(RESULTS) $(DATA) $(DIGITS) ## adaptation without labels, on PACS and on digits never tuned on
	$(BIN)/python benchmarks/labelfree.py --data "$(DATA)" --domains photo,art_painting,cartoon,sketch \
	  --seeds 5 --orders 0 --frames 1000 --json $(RESULTS)/labelfree.json
	$(BIN)/python benchmarks/labelfree.py --data "$(DATA)" --domains photo,art_painting,cartoon,sketch \
	  --seeds 0 --orders 20 --frames 400 --json $(RESULTS)/labelfree-orders.json
	$(BIN)/python benchmarks/labelfree.py --data "$(DIGITS)" \
	  --seeds 0 --orders 6 --frames 300 --json $(RESULTS)/labelfree-digits.json

bench-calibration: $(STAMP) | $(RESULTS) $(DATA) ## probabilities against frequencies on PACS, 20 shots and all images
	$(BIN)/python benchmarks/calibration.py --data "$(DATA)" --order photo,art_painting,cartoon,sketch --shots 20 --json $(RESULTS)/calibration-20.json
	$(BIN)/python benchmarks/calibration.py --data "$(DATA)" --order photo,art_painting,cartoon,sketch --seeds 1 --json $(RESULTS)/calibration-all.json

bench-science: $(STAMP) | $(RESULTS) $(PACS) ## ours beside the published methods; PART=detectors,learners picks, SEEDS=5
	nice -n 5 $(BIN)/python -m benchmarks.science --part "$(PART)" --seeds $(or $(SEEDS),5)
	$(BIN)/python -m benchmarks.page

bench-fleet: $(STAMP) | $(RESULTS) ## 200 daemons at one broker: births, telemetry, commands, CPU and memory
	OMP_NUM_THREADS=1 $(BIN)/edgeear simulate --devices 200 --broker embedded --teach 2 --json $(RESULTS)/fleet.json

bench-fuzz: $(STAMP) | $(RESULTS) ## a million broken messages to a board, which stays as it was
	$(BIN)/python -m benchmarks.fuzz --messages 1000000 --json $(RESULTS)/fuzz.json

bench-daemon: $(STAMP) | $(RESULTS) $(PACS) ## the daemon's start, idle CPU and memory, with 8 domains
	$(BIN)/python -m benchmarks.daemon --data "$(PACS)" --json $(RESULTS)/daemon.json

bench-mqtt: $(STAMP) system | $(RESULTS) ## a day without a broker, and 50 restarts of it under load
	$(BIN)/python -m benchmarks.mqtt --folder /tmp --json $(RESULTS)/mqtt.json

bench-adaptation: $(STAMP) | $(RESULTS) $(PACS) ## latency of predictions without and during a full adaptation
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.adaptation_latency --data "$(PACS)" --json $(RESULTS)/adaptation.json

bench-page: $(STAMP) ## docs/benchmarks.md and its pictures, from the files in benchmarks/results
	$(BIN)/python -m benchmarks.page

clean: ## remove caches and build outputs; the environment stays (rm -r .venv)
	rm -rf build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Written last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@for python in $(or $(PYTHON),python3.11 python3); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then break; else python=; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'edgeear needs Python 3.11 or newer with its venv module, and found none among:' \
	    '$(or $(PYTHON),python3.11 python3).' >&2; \
	  echo 'Install it (Debian: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3' >&2; \
	  exit 1; \
	fi; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	@echo 'Installing into $(VENV): about 1.7 GB, some minutes.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[demo,bench,dev]'
	@touch $@

$(RESULTS):
	mkdir -p $@

$(PACS):
	@archive="$${EDGEEAR_DATA:-}/PACS.tar.gz"; \
	if [ ! -f "$$archive" ]; then \
	  echo "$$archive: not found. Set EDGEEAR_DATA to the folder that holds PACS.tar.gz," \
	    'or DATA to a folder DOMAIN/CLASS/files.' >&2; exit 1; \
	fi; \
	mkdir -p "$(CACHE)"; fresh=$$(mktemp -d "$(CACHE)/unpack-XXXXXX"); \
	tar -xzf "$$archive" -C "$$fresh"; mv "$$fresh/PACS" "$@"; rmdir "$$fresh"

$(DIGITS):
	@archive="$${EDGEEAR_DATA:-}/Digits_tree.tar.gz"; \
	if [ ! -f "$$archive" ]; then \
	  echo "$$archive: not found. Set EDGEEAR_DATA to the folder that holds Digits_tree.tar.gz." >&2; exit 1; \
	fi; \
	mkdir -p "$(CACHE)"; fresh=$$(mktemp -d "$(CACHE)/unpack-XXXXXX"); \
	tar -xzf "$$archive" -C "$$fresh"; mv "$$fresh/Digits/tree" "$@"; rm -r "$$fresh"
