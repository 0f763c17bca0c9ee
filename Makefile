# Everything works from a bare clone: the first target that needs it creates .venv with the versions of constraints.txt.
PYTHONS ?= python3.11 python3.12 python3.13 python3
VENV := .venv
STAMP := $(VENV)/.installed
IN_VENV := $(VENV)/bin/python -m

.PHONY: help install train test exhaustive lint bench combinations vocabulary learning evidence fuzz torture clean

help:
	@echo "make train      learn a VMAS task with the recipe mappo; results in runs/"
	@echo "make test       style, types and tests"
	@echo "make exhaustive the tests of which make test takes a sample: all combinations of components, GRUs in every recipe"
	@echo "make lint       style and types only"
	@echo "make bench      where the time of an iteration goes, against bare loops too (minutes; larger: see benchmarks/README.md)"
	@echo "make combinations  rewrite docs/combinations.md: which components fit together"
	@echo "make vocabulary  rewrite docs/traits_and_keys.md: traits, keys and the rules of the testing kit"
	@echo "make fuzz       10,000 recipes, overrides and run folders that are wrong at random (a quarter of an hour)"
	@echo "make torture    trainings killed, interrupted and out of disk at random, resumed and compared bit for bit (an hour)"
	@echo "make learning   the results of the README: every recipe on every task, five seeds (hours; goes on where it was stopped)"
	@echo "make evidence CLAIM=...  put a claim of the sources to the test (hours; goes on where it was stopped); without CLAIM: a list"
	@echo "make clean      remove .venv and caches; runs/ stays"

install: $(STAMP)

# The constraints stand in the command that installs torch: without them pip may choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	@set -e; for candidate in $(PYTHONS); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "marlkit needs Python 3.11 or newer; none of: $(PYTHONS)" >&2; exit 1; fi; \
	"$$found" -m venv $(VENV)
	$(IN_VENV) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[vmas,dev]'
	@touch $(STAMP)

train: $(STAMP)
	$(VENV)/bin/marlkit train mappo

lint: $(STAMP)
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) codespell_lib
	$(IN_VENV) mypy
	$(VENV)/bin/lint-imports --no-logo

# One process per core; a file's tests stay together, because some share what takes long to make.
test: lint
	$(IN_VENV) pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

exhaustive: $(STAMP)
	$(IN_VENV) pytest --numprocesses auto -m exhaustive

# A few minutes as it stands, on a CPU. BENCH_SIZES="" takes the recipes' own sizes; STICKS is a folder with the measuring sticks.
BENCH_DEVICE ?= cpu
BENCH_ROUNDS ?= 1
BENCH_SIZES ?= iterations=4 warm_up=1 envs=32 steps=20 minibatch=320
BENCH_LARGEST ?= 600
BENCH_SERIES ?= environments recipes
BENCH_OUT ?= benchmarks/results
STICKS ?=
PEER_PYTHON ?=

bench: $(STAMP)
	$(IN_VENV) benchmarks.mappo_balance --device $(BENCH_DEVICE)
	$(IN_VENV) benchmarks.perla_floor --device $(BENCH_DEVICE)
	$(IN_VENV) benchmarks.compare --recipes happo perla_mappo_vmas maddpg f2a2_ddpg qmix --device $(BENCH_DEVICE) --rounds $(BENCH_ROUNDS) \
		$(if $(BENCH_SIZES),--sizes $(BENCH_SIZES)) $(if $(STICKS),--sticks $(STICKS)) $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON)) \
		--out $(BENCH_OUT)/compare-$(BENCH_DEVICE).json
	$(IN_VENV) benchmarks.sweep --series $(BENCH_SERIES) --largest $(BENCH_LARGEST) --device $(BENCH_DEVICE) \
		--out $(BENCH_OUT)/sweep-$(BENCH_DEVICE)

combinations: $(STAMP)
	$(VENV)/bin/marlkit list combinations > docs/combinations.md

vocabulary: $(STAMP)
	(for what in traits keys rules; do $(VENV)/bin/marlkit list $$what && echo; done) > docs/traits_and_keys.md

learning: $(STAMP)
	$(IN_VENV) benchmarks.learning

CLAIM ?=
EVIDENCE ?=

evidence: $(STAMP)
	$(IN_VENV) evidence $(CLAIM) $(EVIDENCE)

FUZZ_INPUTS ?= 10000

fuzz: $(STAMP)
	$(IN_VENV) benchmarks.fuzz --inputs $(FUZZ_INPUTS) --out benchmarks/results/fuzz.json

TRIALS ?= 100

torture: $(STAMP)
	$(IN_VENV) benchmarks.torture --trials $(TRIALS) --out $(BENCH_OUT)/torture.json

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
