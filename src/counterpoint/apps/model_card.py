"""The tiny family's model card: what it is, what it measures, and samples that nobody picked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from counterpoint.apps.record import write_text, write_whole
from counterpoint.evaluation.make import reader
from counterpoint.evaluation.report import markdown
from counterpoint.evaluation.suites.tiny_quality import one_thing_prompts
from counterpoint.types import Image, UserError

SUITE = "tiny-quality"
COLUMNS = 8
SAMPLES = 64
_CARD = """# Model card: the tiny family

A Stable-Diffusion-shaped model set of {size:.1f} MB in half precision: codec, text and image towers, UNet, ControlNets
for {controls}, adapters {adapters}, probes of inner features, and judges that read controls back from pictures.
It is the laboratory of this project, not a tool for pictures: it knows 128 x 128 procedural scenes and the words
of their captions, nothing else. Weights: Apache-2.0, like the code. [tiny-family.md](tiny-family.md) says how it was
trained and what was tried.

## Measured
`{command}`: {n} test scenes that no training has seen, 95 % intervals.
In the rows of the controls, `value` is what the judge reads from pictures made under that control, `floor` from
pictures made from the prompt alone, `ceiling` from the real scenes after the codec's round trip; `adherence` is where
`value` lies between the two. Canny and soft edges are structural similarities of the edges read back, depth a root mean
square error of 0..255, pose and seg overlaps.

{table}
## Samples
The first {samples} prompts of the test range with seeds 0 to {last}, in reading order; none was left out.

![{samples} samples](samples.jpg)

{prompts}
"""


def write_card(results: Path, family: Path, out: Path) -> None:
    """Write ``model-card.md`` and ``samples.jpg``.

    Args:
        results: folder of a ``counterpoint evaluate tiny-quality`` run.
        family: the models' folder.
        out: where the card goes.

    Raises:
        UserError: the folder holds no such results.
    """
    try:
        found = json.loads((results / "results.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{results} holds no results: run counterpoint evaluate tiny-quality --out {results}") from None
    if found.get("suite") != SUITE or found["n"] < SAMPLES:
        raise UserError(f"{results} holds {found.get('suite')} of {found['n']} scenes, not {SUITE} of {SAMPLES}")
    read = reader(results / "pictures")
    sheet = contact_sheet([read(f"prompt/{number}") for number in range(SAMPLES)])
    write_whole(out / "samples.jpg", lambda file: sheet.save(file, "JPEG", quality=90))
    prompts = "\n".join(f"{number + 1}. {prompt}" for number, prompt in enumerate(one_thing_prompts(SAMPLES)))
    card = _CARD.format(
        size=sum(path.stat().st_size for path in family.rglob("*.safetensors")) / 1e6,
        controls=_names(family / "controls"),
        adapters=_names(family / "adapters"),
        command=found["command"],
        n=found["n"],
        table=markdown(found["rows"]),
        samples=SAMPLES,
        last=SAMPLES - 1,
        prompts=prompts,
    )
    write_text(out / "model-card.md", card)


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.glob("*")))


def contact_sheet(pictures: Sequence[Image]) -> PIL.Image.Image:
    """Pictures of one size side by side, :data:`COLUMNS` a row."""
    rows = [np.concatenate(pictures[start : start + COLUMNS], 1) for start in range(0, len(pictures), COLUMNS)]
    return PIL.Image.fromarray(np.concatenate(rows))


if __name__ == "__main__":
    write_card(*map(Path, sys.argv[1:]))
