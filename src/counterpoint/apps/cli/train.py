"""``counterpoint train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

LATEST = "latest"
"""What ``--resume`` without a value means."""


def train(
    recipe: Annotated[str, typer.Argument(help="Which recipe; without one, they are listed.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting. Repeatable.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="[CHECKPOINT]", help="Continue from this checkpoint, or from output_dir's newest whole one."
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")] = False,
    gradients: Annotated[
        int | None,
        typer.Option(
            metavar="BATCHES",
            help="Print how long the gradient of every part of the loss is and how far batches agree on it, and stop.",
            min=2,
        ),
    ] = None,
) -> None:
    """Train a model by a recipe."""
    from counterpoint.recipes import RECIPES
    from counterpoint.training.config import as_json, nearest_first, override
    from counterpoint.types import UserError

    if not recipe and resume in RECIPES:  # the recipe came behind --resume
        recipe, resume = resume, LATEST
    if not recipe:
        for name, one in RECIPES.items():
            print(f"{name}\t{one.summary}")
        return
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; there are {', '.join(nearest_first(recipe, RECIPES))}")

    config = override(RECIPES[recipe].config, settings or [])
    if dry_run:
        print(as_json(config, recipe))
        return

    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.training.machine import check_machine
    from counterpoint.training.trainer import Interrupted, resumable
    from counterpoint.training.trainer import train as run

    output.quiet_libraries()
    if gradients is not None:
        check_machine(config)
        _pulls(RECIPES[recipe].build(config), config, gradients)
        return
    start = resume == LATEST or (Path(resume) if resume else False)
    resumable(config, start, recipe)  # before the data is prepared: a wrong setting should not cost a minute
    check_machine(config)
    _check_validation(config)
    for folder in (config.output_dir, config.cache_dir):
        record.check_writable(folder)
    try:
        job = RECIPES[recipe].build(config)
        print(run(job, config, resume=start, validate=_validation(job.stage, config)))
    except Interrupted as stop:
        output.say(str(stop))
        raise KeyboardInterrupt from stop


def _pulls(job: Any, config: Any, batches: int) -> None:
    from counterpoint.apps.cli import output
    from counterpoint.training.gradients import pulls

    with output.progress("gradients", unit="batch") as listen:
        found = pulls(job, config, batches, listen)
    print(f"{'part':<12}{'length':>12}{'agreement':>12}" + "".join(f"{f'cos {part}':>16}" for part in found))
    for part, one in found.items():
        beside = "".join(f"{one.beside.get(other, 1):>16.3f}" for other in found)
        print(f"{part:<12}{one.length:>12.3g}{one.agreement:>12.3f}{beside}")


_MEASURES = "validation_steps measures adherence: of a ControlNet, on scenes, with a family that has judge a"


def _check_validation(config: Any) -> None:
    """Said before anything is prepared: what can be validated, as far as the settings tell."""
    from counterpoint.recipes.parts import FamilyConfig
    from counterpoint.recipes.photos import PhotoConfig
    from counterpoint.types import UserError

    if not config.validation_steps:
        return
    if config.fsdp:
        raise UserError("validation_steps wants whole networks: leave out fsdp")
    if isinstance(config, PhotoConfig) or not (isinstance(config, FamilyConfig) and hasattr(config, "control_type")):
        raise UserError(_MEASURES)


def _validation(stage: Any, config: Any) -> Any:
    """Adherence, if it is to be validated."""
    from counterpoint.apps.validation import adherence
    from counterpoint.training.stages.diffusion import ControlNetStage
    from counterpoint.types import UserError

    if not config.validation_steps:
        return None
    if isinstance(stage, ControlNetStage) and (validate := adherence(stage, config.pretrained_model_name_or_path)):
        return validate
    raise UserError(_MEASURES)
