# The training methods on the shipped family and its members, with equal steps and data, and what they bring: docs/methods.md.
# A run is KIND.METHOD.SEED in runs/methods; what is finished is not trained again, what was begun is resumed. A group of runs
# is measured on the same cases and noise as soon as they are there, and its numbers are kept in docs/methods: what stands there
# is neither trained nor measured again, so take a group's folder away to have it made anew.
.PHONY: methods variants
ALIGNED := tuned controlnet++ ctrl-u innercontrol
MINIMAL := mi-plain mi-data mi-stage1 mi-stage2
PART = $(word $(1),$(subst ., ,$(notdir $(@D))))
TUNE = $(TRAIN) $(1) --set control_type=$(call PART,1) --set seed=$(call PART,3) $(RESUME)
COMMA := ,
.SECONDEXPANSION:

# The papers' rows: a recipe each, and for Minimal Impact ControlNet without injection (plain; with its balanced data), stage 1,
# and stage 2, which goes on with stage 1.
METHOD_mi-plain := tiny-mi-stage1 --set injection=sum --set balanced=false
METHOD_mi-data := tiny-mi-stage1 --set injection=sum
METHOD_mi-stage2 = tiny-mi-stage2 --set controlnet_model_name_or_path=$(subst stage2,stage1,$(@D))

# InnerControl's tables 2, 5 and 6: which timesteps are rewarded and aligned, and how much.
METHOD_aligned := tiny-innercontrol --set grad_scale=0
METHOD_rewarded-200 := tiny-controlnet++ --set max_timestep_rewarding=200
METHOD_rewarded-920 := tiny-controlnet++ --set max_timestep_rewarding=920
METHOD_both-200 := tiny-innercontrol --set max_timestep_rewarding=200 --set max_timestep_readout=200
METHOD_both-920 := tiny-innercontrol --set max_timestep_rewarding=200
METHOD_beta-half := tiny-innercontrol --set aligning_alpha=0.5
METHOD_beta-two := tiny-innercontrol --set aligning_alpha=2
METHOD_beta-five := tiny-innercontrol --set aligning_alpha=5
METHOD_wide := tiny-innercontrol --set min_timestep_readout=400
METHOD_beta-tenth := tiny-innercontrol --set aligning_alpha=0.1

# Groups, and how each is measured; what was trained with an injection, at the strength that suits it. Rows are marked against
# the network that went on as long without the method, where there is one. Other networks are strengthened when they are exported,
# as much as the one that they began with: groups called trained- look at them as strong as they were trained, as the papers do,
# and windows, weights and settings are compared so alone. Silent ones are Minimal Impact ControlNet's tables: by sum and by
# balanced combination, the plain networks at unequal weights, and how far each is from a gradient.
EACH = $(foreach method,$(2),$(1).$(method).$(3))
PAIR = $(foreach method,$(1),canny.$(method).$(2)$(COMMA)pose.$(method).$(2))
WEIGHED = silent -n 64 --fusion sum --weight canny=$(1) --weight pose=$(2)
TRAINED_depth := depth=0.4
TRAINED_hed := hed=0.5
TRAINED_lineart := lineart=0.5
TRAINED_seg := seg=0.3333
$(foreach seed,0 1 2 3,$(eval RUNS_depth-$(seed) := $(call EACH,depth,$(ALIGNED),$(seed))))
$(foreach kind,hed lineart seg,$(eval RUNS_$(kind) := $(call EACH,$(kind),$(ALIGNED),0)))
$(foreach kind,hed lineart seg,$(eval RUNS_trained-$(kind) := $(RUNS_$(kind))))
$(foreach seed,0 1 2 3,$(eval RUNS_trained-depth-$(seed) := $(RUNS_depth-$(seed))))
RUNS_trained-depth-windows := $(call EACH,depth,tuned aligned rewarded-200 rewarded-920 both-200 both-920,0)
RUNS_trained-depth-weights := $(call EACH,depth,tuned beta-half beta-two beta-five,0)
RUNS_trained-seg-settings := $(call EACH,seg,tuned wide beta-tenth,0)
$(foreach seed,0 1,$(eval RUNS_silent-$(seed) := $(call PAIR,$(MINIMAL),$(seed))))
$(foreach seed,0 1,$(eval RUNS_unequal-canny-$(seed) := $(call PAIR,mi-plain,$(seed))))
$(foreach seed,0 1,$(eval RUNS_unequal-pose-$(seed) := $(call PAIR,mi-plain,$(seed))))
$(foreach seed,0 1,$(eval RUNS_gradient-$(seed) := $(foreach kind,canny pose,$(call EACH,$(kind),$(MINIMAL),$(seed)))))
HOW_depth := single --fusion sum -n 128
HOW_hed := single --fusion sum -n 128 --seeds 4
HOW_lineart := $(HOW_hed)
HOW_seg := $(HOW_hed)
$(foreach kind,depth hed lineart seg,$(eval HOW_trained-$(kind) := $(HOW_$(kind)) --weight $(TRAINED_$(kind))))
HOW_silent := silent -n 64 --fusion sum --fusion mgda:reading=literal
HOW_unequal-canny := $(call WEIGHED,1.5,0.5)
HOW_unequal-pose := $(call WEIGHED,0.5,1.5)
HOW_gradient := conservativity -n 64
GROUPS := $(patsubst RUNS_%,%,$(filter RUNS_%,$(.VARIABLES)))
SPLIT = $(subst $(COMMA), ,$(1))
PLACE = runs/$(if $(findstring mi-stage,$(1)),calibrated,methods)/$(1)
NETWORK = $(firstword $(subst ., ,$(1)))=$(call PLACE,$(1))
VERSUS = --versus $(subst $() ,$(COMMA),$(foreach run,$(call SPLIT,$(1)),$(call NETWORK,$(run))))
FAIR = $(strip $(foreach run,$(RUNS_$(1)),$(if $(findstring .tuned.,$(run))$(findstring .mi-plain.,$(run)),$(run))))
AT = $(if $(filter trained-%,$(1)),$(TRAINED_$(firstword $(subst ., ,$(FAIR)))) )
BASE = $(if $(filter silent-% depth-% trained-% hed lineart seg,$(1)),$(if $(FAIR),--baseline "sum $(AT)of $(subst $(COMMA),+,$(FAIR))"))
RUNS := $(sort $(foreach group,$(GROUPS),$(call SPLIT,$(RUNS_$(group)))))
KEPT := $(GROUPS:%=docs/methods/%/results.json)

$(RUNS:%=runs/methods/%/config.json): runs/methods/%/config.json: | $$(if $$(findstring mi-stage2,$$*),runs/methods/$$(subst stage2,stage1,$$*)/config.json) $(READY)
	$(call TUNE,$(or $(METHOD_$(call PART,2)),tiny-$(call PART,2)))

runs/calibrated/%/config.json: runs/methods/%/config.json
	$(BIN)/python -m counterpoint.apps.validation runs/methods/$* src/counterpoint/models/tiny $(call PART,1) $(@D)

$(KEPT): docs/methods/%/results.json: | $$(if $$(wildcard $$@),,$$(foreach run,$$(call SPLIT,$$(RUNS_$$*)),$$(call PLACE,$$(run))/config.json))
	$(BIN)/counterpoint evaluate $(or $(HOW_$*),$(HOW_$(patsubst %-$(lastword $(subst -, ,$*)),%,$*))) \
	  --out runs/tables/$* $(foreach run,$(RUNS_$*),$(call VERSUS,$(run))) $(call BASE,$*)
	mkdir -p $(@D)
	cp runs/tables/$*/results.json $@

methods: $(KEPT)
	$(BIN)/counterpoint evaluate leaderboard docs/methods --out docs/methods.md

# What the family ships of them: its variants of depth, canny and pose.
SHIPPED := depth-inner=depth.innercontrol.0 canny-mi=canny.mi-stage2.0 pose-mi=pose.mi-stage2.0

variants: $(foreach one,$(SHIPPED),$(call PLACE,$(lastword $(subst =, ,$(one))))/config.json)
	$(foreach one,$(SHIPPED),ln -sfn $(patsubst runs/%,%,$(call PLACE,$(lastword $(subst =, ,$(one))))) runs/control-$(firstword $(subst =, ,$(one)));)
	$(GATHER) src/counterpoint/models/tiny
