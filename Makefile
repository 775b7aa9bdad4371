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
.PHONY: demo docs test prove family members methods tables card leaderboard ablations aggregation pictures lint install clean

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
# all, where bf16 is slower than float32: `make family SET='--set mixed_precision=no'`.
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
	$(TRAIN) tiny-adapter --set adapter=$* $(RESUME)

# The training methods on the shipped family and its members, with equal steps and data: KIND.METHOD.SEED in
# runs/methods. `mi-data` is Minimal Impact ControlNet's balanced data alone; its stage 2 goes on with stage 1.
ALIGNED := tuned controlnet++ ctrl-u innercontrol
MINIMAL := mi-plain mi-data mi-stage1 mi-stage2
DEPTH := $(foreach method,$(ALIGNED),$(foreach seed,0 1 2 3,depth.$(method).$(seed)))
OTHERS := $(foreach kind,hed lineart seg,$(foreach method,$(ALIGNED),$(kind).$(method).0))
IMPACT := $(foreach kind,canny pose,$(foreach method,$(MINIMAL),$(foreach seed,0 1,$(kind).$(method).$(seed))))
PART = $(word $(1),$(subst ., ,$(notdir $(@D))))
TUNE = $(TRAIN) $(1) --set control_type=$(call PART,1) --set seed=$(call PART,3) $(RESUME)

# InnerControl's tables 2, 5 and 6 on the same steps: which timesteps are rewarded and aligned, and how much.
ALTERED_aligned := tiny-innercontrol --set grad_scale=0
ALTERED_rewarded-200 := tiny-controlnet++ --set max_timestep_rewarding=200
ALTERED_rewarded-920 := tiny-controlnet++ --set max_timestep_rewarding=920
ALTERED_both-200 := tiny-innercontrol --set max_timestep_rewarding=200 --set max_timestep_readout=200
ALTERED_both-920 := tiny-innercontrol --set max_timestep_rewarding=200
ALTERED_beta-half := tiny-innercontrol --set aligning_alpha=0.5
ALTERED_beta-two := tiny-innercontrol --set aligning_alpha=2
ALTERED_beta-five := tiny-innercontrol --set aligning_alpha=5
ALTERED_wide := tiny-innercontrol --set min_timestep_readout=400
ALTERED_beta-tenth := tiny-innercontrol --set aligning_alpha=0.1
ALTERED := $(foreach name,aligned rewarded-200 rewarded-920 both-200 both-920 beta-half beta-two beta-five,depth.$(name).0) \
  $(foreach name,wide beta-tenth,seg.$(name).0)

methods: $(patsubst %,runs/methods/%/config.json,$(DEPTH) $(OTHERS) $(IMPACT) $(ALTERED))

.SECONDEXPANSION:
$(patsubst %,runs/methods/%/config.json,$(DEPTH) $(OTHERS)): | $(READY)
	$(call TUNE,tiny-$(call PART,2))

$(patsubst %,runs/methods/%/config.json,$(ALTERED)): | $(READY)
	$(call TUNE,$(ALTERED_$(call PART,2)))

runs/methods/%/config.json: | $$(if $$(findstring mi-stage2,$$*),runs/methods/$$(subst stage2,stage1,$$*)/config.json) $(READY)
	$(call TUNE,tiny-$(if $(findstring stage2,$*),mi-stage2,mi-stage1)) \
	  $(if $(findstring mi-plain,$*),--set injection=sum --set balanced=false) $(if $(findstring mi-data,$*),--set injection=sum) \
	  $(if $(findstring stage2,$*),--set controlnet_model_name_or_path=runs/methods/$(subst stage2,stage1,$*))

# What they bring, on the same cases and noise: one page a kind of control, in runs/tables. The silent pages are Minimal
# Impact ControlNet's: the plain and the balanced networks by sum and by balanced combination (its * and ***, and **),
# the plain ones at unequal weights (^0.5 and ^1.5), and how far from a gradient each is.
VERSUS = $(foreach run,$(filter $(1).%,$(DEPTH) $(OTHERS) $(ALTERED)),--versus $(1)=runs/methods/$(run))
SINGLE = $(BIN)/counterpoint evaluate single --fusion sum -n 128 --out runs/tables/$(1) $(call VERSUS,$(1))
PAIR = --versus canny=runs/methods/canny.$(1)$(COMMA)pose=runs/methods/pose.$(1)
PAIRED = $(foreach method,$(1),$(foreach seed,0 1,$(call PAIR,$(method).$(seed))))
SILENT = $(BIN)/counterpoint evaluate silent -n 128 --out runs/tables/$(1)
COMMA := ,

tables: methods
	$(call SINGLE,depth)
	$(call SINGLE,hed) --seeds 4
	$(call SINGLE,lineart) --seeds 4
	$(call SINGLE,seg) --seeds 4
	$(call SILENT,silent) --gate-silence --fusion sum --fusion mgda:reading=literal $(call PAIRED,$(MINIMAL))
	$(call SILENT,silent-canny) --fusion sum --weight canny=1.5 --weight pose=0.5 $(call PAIRED,mi-plain)
	$(call SILENT,silent-pose) --fusion sum --weight canny=0.5 --weight pose=1.5 $(call PAIRED,mi-plain)
	$(BIN)/counterpoint evaluate conservativity -n 64 --out runs/tables/asym $(foreach run,$(IMPACT),--versus $(firstword $(subst ., ,$(run)))=runs/methods/$(run))

# What the family measures, and 64 samples that nobody picked: docs/model-card.md.
card: $(READY)
	$(BIN)/counterpoint evaluate tiny-quality -n 256 --out runs/quality
	$(BIN)/python -m counterpoint.apps.model_card runs/quality src/counterpoint/models/tiny docs

# Every rule on every suite beside the papers' own numbers: docs/leaderboard.md. What was made is not made again.
SUITE = $(BIN)/counterpoint evaluate $(1) --out runs/suites/$(1)

leaderboard: $(READY)
	$(call SUITE,conflicting) -n 256
	$(call SUITE,complementary) -n 128
	$(call SUITE,silent) -n 64 --gate-silence
	$(call SUITE,single) -n 128 --fusion sum
	$(BIN)/counterpoint evaluate leaderboard runs/suites --out docs/leaderboard.md

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

# Whole models together (AMDM): each alone, what one cannot do; pairs and all three; and what the settings do, on the
# layouts of a smaller set.
ALONE := base interact migc style
TOGETHER := interact,migc interact,style interact,migc,style
HOW := steps=1 steps=3 steps=5 steps=10 weights=0.3 weights=0.7 mix=paper mix=unit noise=separate mean=stale \
  eta=0.1x eta=0.3x eta=0.7x eta=0.9x paper authors

aggregation: $(READY)
	$(BIN)/counterpoint evaluate layout --steps 50 --out runs/aggregation/layout -n 160 $(addprefix --aggregate ,$(ALONE) $(TOGETHER))
	$(BIN)/counterpoint evaluate style --steps 50 --out runs/aggregation/style -n 160 $(addprefix --aggregate ,$(ALONE) $(TOGETHER))
	$(BIN)/counterpoint evaluate layout --steps 50 --out runs/aggregation/settings -n 32 --aggregate interact,migc $(addprefix --aggregation ,$(HOW))

# The pictures of README and docs that show the rules.
pictures: $(READY)
	$(BIN)/counterpoint demo --out runs/demo
	$(BIN)/python -m counterpoint.apps.pictures runs/demo docs

clean:
	rm -rf .venv dist build
