# make quickstart   the whole story on embedded data: train, correct online, compare (CPU, about 10 minutes on two cores)
# make test         all tests
# make help         everything else
#
# The first call makes a virtual environment and installs the project into it; only Python >= 3.11 is needed.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
fresh ?= 0
seed ?= 0

BIN := $(VENV)/bin
RUN := $(BIN)/python -m
INSTALLED := $(VENV)/.installed
OUT := runs/quickstart$(if $(filter-out 0,$(seed)),-seed$(seed))
THREADS := $(shell echo $$((($$(getconf _NPROCESSORS_ONLN) + 1) / 2)))
# what a command prints, under a name; Ctrl-C is left to the command, which still has something to say
named = 2>&1 | (trap '' INT; sed -u 's/^/$(1): /')
SHELL := bash
.SHELLFLAGS := -o pipefail -c
CODE := src callbacks datamodules benchmarks testing tests

ifneq ($(filter-out 0 1,$(fresh)),)
$(error fresh must be 0 or 1, got $(fresh))
endif

ifneq ($(shell printf '%s' '$(seed)' | tr -d 0-9),)
$(error seed must be a number, got $(seed))
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-one quickstart-two test test-slow test-slurm test-servers test-browser test-gpu golden base base-full lint clean install

help:
	@echo "make quickstart   train, correct online and compare on embedded data, into runs/quickstart"
	@echo "                  a second call resumes; fresh=1 removes $(OUT) first; seed=1 is another run"
	@echo "make test         all tests"
	@echo "make test-slow    those that take long"
	@echo "make test-slurm   jobs on a Slurm of two nodes that it starts on this machine (root, Debian's Slurm packages)"
	@echo "make test-servers experts behind servers of others, as far as they are installed"
	@echo "make test-browser pages in Debian's Chromium, as far as it is installed"
	@echo "make test-gpu     what needs a CUDA device"
	@echo "make golden       the numbers of the released code; GOLDEN_LLADA_V=DIR names another set of them"
	@echo "make base         train the embedded base model again, into assets/base (hours)"
	@echo "make base-full    after that its twin with full attention, into runs/base-full (hours)"
	@echo "make lint         ruff and pyright"
	@echo "make install      only the virtual environment $(VENV)"
	@echo "make clean        remove .venv and caches; data, runs and assets stay"
	@echo "variables:        PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) (TORCH: where there is no CUDA device)"

# The arms train two at a time, each on half of the cores: small models gain less from a second core each.
quickstart: $(INSTALLED)
	$(if $(filter 1,$(fresh)),rm -rf $(OUT))
	$(RUN) src.prepare conf=quickstart/scenes
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j2 quickstart-one quickstart-two
	$(RUN) src.evaluate conf=quickstart/evaluate evaluate.seed=$(seed) evaluate.out=$(OUT)
	$(RUN) src.generate conf=quickstart/watch model.path=$(OUT)/mask/model sampler=plain out=$(OUT)/watch/mask_plain.jsonl
	$(RUN) src.generate conf=quickstart/watch model.path=$(OUT)/stage1_2/model out=$(OUT)/watch/stage1_2_refine.jsonl \
		html=$(OUT)/trace.html compare=$(OUT)/watch/mask_plain.trace.jsonl

quickstart-one:
	$(RUN) src.train conf=mask,quickstart seed=$(seed) run_dir=$(OUT)/mask $(call named,mask)
	$(RUN) src.train conf=quickstart/stage2 seed=$(seed) run_dir=$(OUT)/stage2 model.path=assets/base $(call named,stage2)

quickstart-two:
	$(RUN) src.train conf=stage1,quickstart seed=$(seed) run_dir=$(OUT)/stage1 $(call named,stage1)
	$(RUN) src.train conf=stage1,quickstart seed=$(seed) run_dir=$(OUT)/half trainer.max_steps=150 $(call named,half)
	$(RUN) src.train conf=quickstart/stage2 seed=$(seed) run_dir=$(OUT)/stage1_2 model.path=$(OUT)/half/model \
		trainer.max_steps=150 $(call named,stage1_2)

test: $(INSTALLED)
	$(RUN) pytest -n auto --maxprocesses=4 --dist loadfile

test-slow: $(INSTALLED)
	$(RUN) pytest -m slow

# The Slurm is of Debian's packages, runs as root, and keeps to a temporary folder:
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
test-slurm: $(INSTALLED)
	$(RUN) pytest -m slurm tests/test_slurm.py

# Servers of others: needs `pip install -e .[experts-test]`; tests whose server is missing are skipped.
test-servers: $(INSTALLED)
	$(RUN) pytest -m servers

# Needs Debian's package chromium, and for the demo `pip install -e .[demo]`; tests whose part is missing are skipped.
test-browser: $(INSTALLED)
	$(RUN) pytest -m browser

test-gpu: $(INSTALLED)
	$(RUN) pytest -m gpu

golden: $(INSTALLED)
	$(RUN) pytest -k golden

# The phases are explained in conf/base_phases; each resumes where it was stopped.
base: $(INSTALLED)
	$(RUN) src.prepare conf=scenes_large
	$(RUN) src.prepare conf=base_phases/brief_scenes
	$(RUN) src.prepare conf=base_phases/pairs_scenes
	$(RUN) src.train conf=base_phases/tower
	$(RUN) src.train conf=base_phases/pairs
	$(RUN) src.train conf=base_phases/brief
	$(RUN) src.train conf=base_phases/detailed
	$(RUN) src.evaluate conf=base_phases/evaluate
	rm -rf assets/base.partial
	mkdir -p assets
	cp -R runs/base/model assets/base.partial
	rm -rf assets/base
	mv assets/base.partial assets/base

# After `make base`, from the same tower; not embedded.
base-full: $(INSTALLED)
	$(RUN) src.train conf=base_phases/pairs,base_phases/full run_dir=runs/base-full-pairs
	$(RUN) src.train conf=base_phases/brief,base_phases/full run_dir=runs/base-full-brief \
		model.path=runs/base-full-pairs/model
	$(RUN) src.train conf=base_phases/detailed,base_phases/full run_dir=runs/base-full \
		model.path=runs/base-full-brief/model

lint: $(INSTALLED)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: no $(PYTHON) here; install Python 3.11 or newer, or name it: PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.11 or newer is needed; name another one:" \
			"PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; install its venv module" \
			"(Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	nvidia-smi -L >/dev/null 2>&1 || $(RUN) pip install $(TORCH)
	$(RUN) pip install -e '.[dev]'
	@touch $@
