"""The model card of a training run: what a stranger to the run should know about its weights."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import version
from pathlib import Path

from diffusers import ControlNetModel
from huggingface_hub import ModelCardData

from counterpoint.training.config import TrainConfig
from counterpoint.training.stage import Job

CARD = "README.md"
_TEXT = """---
{data}
---
# {name}

{what}, trained by the recipe `{recipe}` of Counterpoint {version}. {method}

{use}It took {steps} steps of {batch} samples{world}, out of {samples}{source}. No licence is named here: it depends on
the data and on the model that this one started from.

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
_STOCK = """In diffusers alone:

```python
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

network = ControlNetModel.from_pretrained("{folder}", torch_dtype=torch.float32)
pipe = StableDiffusionControlNetPipeline.from_pretrained(
    "{base}", controlnet=network, torch_dtype=torch.float32, safety_checker=None
)
image = pipe("PROMPT", image=CONDITION_IMAGE).images[0]
```

"""
_LAST = 5


def write_card(folder: Path, job: Job, config: TrainConfig, settings: str, processes: int = 1) -> None:
    """Write the card beside the exported network.

    Args:
        folder: the run's output, with its ``log.jsonl``.
        job: what was trained, and on what.
        config: all settings.
        settings: what ``train.json`` holds.
        processes: that shared each step.
    """
    base = str(getattr(config, "pretrained_model_name_or_path", "") or "")
    kind = getattr(config, "control_type", None)
    networks = [type(module).__name__ for module in job.stage.trained_modules().values()]
    rule = getattr(getattr(job.stage, "inject", None), "rule", None)
    taken_in = (
        f'\nimages = pipe(..., fusion="{rule}").images  # taken in as it was trained; stock diffusers would add it'
        if rule
        else ""
    )
    use = ""
    if ControlNetModel.__name__ in networks and base and kind:
        use = _USE.format(base=base, kind=kind, folder=folder, taken_in=taken_in)
        use += "" if rule else _STOCK.format(base=base, folder=folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[-_LAST:]]
    keys = list(dict.fromkeys(key for line in log for key in line if key not in {"lr", "seconds_per_step"}))
    rows = [[str(line.get(key, "")) for key in keys] for line in log]
    table = [f"| {' | '.join(row)} |" for row in (keys, ["---"] * len(keys), *rows)]
    photos = getattr(config, "train_data_dir", None)
    text = _TEXT.format(
        data=ModelCardData(
            library_name="diffusers",
            base_model=None if Path(base).is_dir() else base,
            tags=["counterpoint", *([kind] if kind else [])],
        ).to_yaml(),
        name=folder.resolve().name,
        what=" and ".join(networks) + (f" for {kind}" if kind else ""),
        recipe=job.recipe,
        method=(inspect.getdoc(job.stage) or "").split("\n\n")[0],
        use=use,
        version=version("counterpoint"),
        steps=config.max_train_steps,
        batch=config.train_batch_size * config.gradient_accumulation_steps * processes,
        world=f" over {processes} processes" if processes > 1 else "",
        samples=len(job.samples),
        source=f" of {photos}" if photos else "",
        log="\n".join(table) if log else "It was too short for one.",
        settings=settings,
    )
    (folder / CARD).write_text(text)
