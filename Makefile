# Two commands are enough on a fresh machine: `make demo` and `make test`. Everything is installed into .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Few threads that spin briefly: two busy processes with spinning threads slow each other down many times over.
export OMP_NUM_THREADS ?= 2
export GOMP_SPINCOUNT ?= 10000
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: demo docs test prove family card lint install clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing: install Python 3.11 or newer, or name one with make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V): name another with make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: Python's venv module is missing: install it (Debian: apt-get install python3-venv)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/counterpoint demo
	@echo "Open counterpoint-demo/index.html in a browser."

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, in site/; a link that leads nowhere fails.
docs: $(READY)
	$(BIN)/zensical build --strict --clean

test: lint docs
	$(BIN)/python -m pytest -m "not prove"

prove: $(READY)
	$(BIN)/python -m pytest -m prove --timeout 1800

# The models from nothing, in runs/: docs/tiny-family.md says what that takes. What is finished is not trained
# again, what was begun is resumed. Two members at a time: `make -j2 family OMP_NUM_THREADS=1`.
KINDS := canny hed depth pose seg
RESUME = $(if $(wildcard $(@D)/checkpoint-*/complete.json),--resume)
TRAIN = $(BIN)/counterpoint train --set output_dir=$(@D) --set cache_dir=runs/scenes
GATHER = $(BIN)/python -m counterpoint.recipes.family runs
ON = --set pretrained_model_name_or_path=runs/family

family: $(KINDS:%=runs/control-%/strength.json) runs/judge-a/config.json runs/judge-b/config.json
	$(GATHER) runs/family
	$(GATHER) src/counterpoint/models/tiny

runs/codec/config.json: | $(READY)
	$(TRAIN) tiny-codec $(RESUME)

runs/towers/config.json: | runs/codec/config.json
	$(TRAIN) tiny-towers $(RESUME)

runs/base/config.json: | runs/codec/config.json runs/towers/config.json
	$(GATHER) runs/family
	$(TRAIN) tiny-base $(ON) $(RESUME)

runs/family/unet/config.json: | runs/base/config.json
	$(GATHER) runs/family

runs/control-%/config.json: | runs/family/unet/config.json
	$(TRAIN) tiny-controlnet $(ON) --set control_type=$* $(RESUME)

runs/control-%/strength.json: runs/control-%/config.json | runs/family/judges/b/config.json
	$(BIN)/python -m counterpoint.apps.validation $(@D) runs/family $*

runs/family/judges/b/config.json: | runs/judge-b/config.json
	$(GATHER) runs/family

runs/judge-%/config.json: | runs/codec/config.json
	$(TRAIN) tiny-judge --set judge=$* $(RESUME)

# What the family measures, and 64 samples that nobody picked: docs/model-card.md.
card: $(READY)
	$(BIN)/counterpoint evaluate tiny-quality -n 256 --out runs/quality
	$(BIN)/python -m counterpoint.apps.model_card runs/quality src/counterpoint/models/tiny docs

clean:
	rm -rf .venv dist build
