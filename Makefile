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

# What was trained stays, also where it only leads to something else.
.SECONDARY:
.PHONY: demo docs test prove family members methods card leaderboard ablations aggregation pictures lint install clean

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
# again, what was begun is resumed. Two members at a time: `make -j2 family OMP_NUM_THREADS=1`; other settings for
# all, such as another precision than the machine is quicker in: `make family SET='--set mixed_precision=no'`.
KINDS := canny hed depth pose seg
PROBED := depth hed lineart pose seg
RESUME = $(if $(wildcard $(@D)/checkpoint-*/complete.json),--resume)
TRAIN = $(BIN)/counterpoint train --set output_dir=$(@D) --set cache_dir=runs/scenes $(SET)
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

# What the shipped family gains later: a ControlNet for line drawings, probes, and adapters.
ADAPTERS := interact migc style

members: runs/control-lineart/strength.json $(PROBED:%=runs/probe-%/config.json) $(ADAPTERS:%=runs/adapter-%/adapter.safetensors)
	$(GATHER) src/counterpoint/models/tiny
	$(BIN)/python -m counterpoint.apps.probe_error src/counterpoint/models/tiny docs

runs/control-lineart/config.json: | $(READY)
	$(TRAIN) tiny-controlnet --set control_type=lineart $(RESUME)

runs/control-lineart/strength.json: runs/control-lineart/config.json
	$(BIN)/python -m counterpoint.apps.validation $(@D) src/counterpoint/models/tiny lineart

runs/probe-%/config.json: | $(READY)
	$(TRAIN) tiny-probe --set control_type=$* $(RESUME)

runs/adapter-%/adapter.safetensors: | $(READY)
	$(TRAIN) tiny-adapter --set adapter=$* $(if $(filter style,$*),--set max_train_steps=5000) $(RESUME)

include methods.mk

# What the family measures, and 64 samples that nobody picked: docs/model-card.md.
card: $(READY)
	$(BIN)/counterpoint evaluate tiny-quality -n 256 --out runs/quality
	$(BIN)/python -m counterpoint.apps.model_card runs/quality src/counterpoint/models/tiny docs

# Every suite's record in a folder of docs, which pages are made from.
KEEP = for one in $(1)/*; do mkdir -p $(2)/$${one\#\#*/}; cp $$one/results.json $(2)/$${one\#\#*/}/; done

# Every rule on every suite beside the papers' own numbers: docs/leaderboard.md. What was made is not made again.
SUITE = $(BIN)/counterpoint evaluate $(1) --out runs/suites/$(1)

leaderboard: $(READY)
	$(call SUITE,conflicting) -n 256
	$(call SUITE,complementary) -n 128
	$(call SUITE,silent) -n 64 --gate-silence
	$(call SUITE,single) -n 128 --fusion sum
	$(call KEEP,runs/suites,docs/leaderboard)
	$(BIN)/counterpoint evaluate leaderboard docs/leaderboard --out docs/leaderboard.md

# What rules are set to, against conflicts: thresholds, when and where keys are lent, a control's weight turned by hand.
# Gating where controls agree, and readings of Minimal Impact ControlNet's equation where they are silent.
SETTINGS = $(foreach value,$(2),--fusion $(1)=$(value))
ABLATION = $(BIN)/counterpoint evaluate $(1) -n 64 --out runs/ablations/$(2)
READINGS = mgda mgda:reading=literal mgda:granularity=pixel mgda:reading=literal,granularity=pixel

ablations: $(READY)
	$(call ABLATION,conflicting,weights) --sweep pose=1:2.5:0.5 --fusion sum --fusion pix --fusion cross
	$(call ABLATION,conflicting,delta) $(call SETTINGS,pix:delta,0 0.2 0.4 0.6 0.7 0.8 0.9 1)
	$(call ABLATION,conflicting,start) $(call SETTINGS,cross:start,0 0.1 0.2 0.3 0.5)
	$(call ABLATION,conflicting,layer) $(call SETTINGS,cross:layer,0 1 2 3)
	$(call ABLATION,complementary,gate) --fusion sum --fusion pix --fusion cross --gate-silence
	$(call ABLATION,silent,readings) --fusion sum $(addprefix --fusion ,$(READINGS)) --gate-silence

# Whole models together (AMDM): each alone, what one cannot do; pairs and all three; the paper's recipes; and what the
# settings do, on the layouts of a smaller set. docs/aggregation.md draws on them.
TOGETHER = $(BIN)/counterpoint evaluate $(1) --steps $(2) --out runs/aggregation/$(3) -n $(4)
PLACING := base interact migc interact,migc
STYLING := base style interact interact,style interact,migc,style
LENGTHS := $(addprefix eta=0.5x$(COMMA),steps=3 steps=1 steps=10 steps=18 steps=25 steps=35)
HALF := $(addprefix eta=0.5x$(COMMA),weights=0.3 weights=0.7 mix=unit mix=paper noise=separate mean=stale)
HOW := eta=0.5x eta=0.1x eta=0.3x eta=0.7x eta=0.9x $(HALF) paper,steps=18 authors,steps=18 paper authors

aggregation: $(READY)
	$(call TOGETHER,layout,50,layout,160) $(addprefix --aggregate ,$(PLACING)) --aggregation eta=0.5x
	$(call TOGETHER,layout,50,layout-default,80) $(addprefix --aggregate ,$(PLACING)) --aggregation eta=0.3x
	$(call TOGETHER,style,50,style,96) $(addprefix --aggregate ,$(STYLING)) --aggregation eta=0.3x
	$(call TOGETHER,style,10,style-recipe,96) --weight reference=0.8 --aggregate interact,style --aggregation paper-style --aggregation eta=0.3x
	$(call TOGETHER,layout,10,three-recipe,20) --aggregate interact,migc,style --aggregation paper-three --aggregation eta=0.3x
	$(call TOGETHER,layout,50,windows,24) --aggregate interact,migc $(addprefix --aggregation ,$(LENGTHS))
	$(call TOGETHER,layout,50,settings,20) --aggregate interact,migc $(addprefix --aggregation ,$(HOW))
	$(call KEEP,runs/aggregation,docs/aggregation)
	$(BIN)/counterpoint evaluate leaderboard docs/aggregation --out docs/aggregation-results.md

# The pictures of README and docs that show the rules.
pictures: $(READY)
	$(BIN)/counterpoint demo --out runs/demo
	$(BIN)/python -m counterpoint.apps.pictures runs/demo docs

clean:
	rm -rf .venv dist build
