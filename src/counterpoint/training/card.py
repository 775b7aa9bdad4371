"""The model card of a training run: what a stranger to the run should know about its weights."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import version
from pathlib import Path

from diffusers import ControlNetModel
from huggingface_hub import ModelCardData

from counterpoint.training.config import TrainConfig
from counterpoint.training.stage import Stage

CARD = "README.md"
_TEXT = """---
{data}
---
# {name}

{method}

{use}Trained with Counterpoint {version}: {steps} steps of {samples} samples{world}. No licence is
named here: it depends on the data and on the model that this one started from.

## The last of its log
{log}

## Settings
```json
{settings}
```
"""
_USE = """```python
import counterpoint

pipe = counterpoint.load("{base}", controls={{"{kind}": "{folder}"}}){taken_in}
```

"""
_LAST = 5


def write_card(folder: Path, stage: Stage, config: TrainConfig, settings: str, processes: int = 1) -> None:
    """Write the card beside the exported network.

    Args:
        folder: the run's output, with its ``log.jsonl``.
        stage: what was trained.
        config: all settings.
        settings: what ``train.json`` holds.
        processes: that shared each step.
    """
    base = str(getattr(config, "pretrained_model_name_or_path", "") or "")
    kind = getattr(config, "control_type", None)
    modules = [type(module) for module in stage.trained_modules().values()]
    rule = getattr(getattr(stage, "inject", None), "rule", None)
    taken_in = (
        f'\nimages = pipe(..., fusion="{rule}").images  # taken in as it was trained; stock diffusers would add it'
        if rule
        else ""
    )
    use = ""
    if ControlNetModel in modules and base and kind:
        use = _USE.format(base=base, kind=kind, folder=folder, taken_in=taken_in)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[-_LAST:]]
    keys = list(dict.fromkeys(key for line in log for key in line if key not in {"lr", "seconds_per_step"}))
    rows = [[str(line.get(key, "")) for key in keys] for line in log]
    table = [f"| {' | '.join(row)} |" for row in (keys, ["---"] * len(keys), *rows)]
    text = _TEXT.format(
        data=ModelCardData(
            library_name="diffusers",
            base_model=None if Path(base).is_dir() else base,
            tags=["counterpoint", *([kind] if kind else [])],
        ).to_yaml(),
        name=folder.resolve().name,
        method=(inspect.getdoc(stage) or "").split("\n\n")[0],
        use=use,
        version=version("counterpoint"),
        steps=config.max_train_steps,
        samples=config.train_batch_size * config.gradient_accumulation_steps * processes,
        world=f", {processes} processes" if processes > 1 else "",
        log="\n".join(table) if log else "It was too short for one.",
        settings=settings,
    )
    (folder / CARD).write_text(text)
