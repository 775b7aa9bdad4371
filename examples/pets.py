"""The tiny family leaves its scenes: photos of cats and dogs, with their trimaps as the control.

Fine-tunes the codec and the base on 540 photos, trains a ControlNet for trimaps and a network that reads trimaps from
pictures, then asks on 60 photos that none of them has seen: does a picture follow its trimap? Killed and begun again,
it goes on.

    python examples/pets.py PETS OUT

``PETS`` is the Oxford-IIIT Pet data set or a part of it: ``images/NAME.jpg``, where cats' names have a capital, and
``trimaps/NAME.png`` or ``annotations/trimaps/NAME.png`` (1 foreground, 2 background, 3 border).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch

import counterpoint as cp
from counterpoint.data.coco import PET_TRIMAPS
from counterpoint.data.photos import ImageFolder
from counterpoint.evaluation.statistics import bootstrap
from counterpoint.evaluation.suite import stack, unstack
from counterpoint.metrics.maps import miou, overlap
from counterpoint.models.load import TINY
from counterpoint.models.perception import PerceptionModel
from counterpoint.recipes.family import assemble

SIZE = 128
COLOURS = np.array([[0, 0, 0], [255, 0, 122], [120, 120, 180], [255, 255, 0]], np.uint8)
"""Of a trimap's numbers, in the control's picture."""
CLASSES = len(COLOURS)


def prepare(pets: Path, folder: Path, held_out: bool) -> Path:
    """Every tenth photo is held out."""
    found = next((pets / part for part in PET_TRIMAPS if (pets / part).is_dir()), None)
    if found is None:
        sys.exit(f"error: {pets} holds neither {' nor '.join(PET_TRIMAPS)}")
    for part in ("images", "trimaps", "seg"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, photo in enumerate(sorted(pets.glob("images/*.jpg"))):
        if (number % 10 == 0) != held_out:
            continue
        name = photo.stem
        shutil.copy(photo, folder / "images")
        shutil.copy(found / f"{name}.png", folder / "trimaps")
        trimap = np.array(PIL.Image.open(found / f"{name}.png"))
        PIL.Image.fromarray(COLOURS[trimap]).save(folder / "seg" / f"{name}.png")
        rows.append(
            {
                "file_name": f"images/{photo.name}",
                "text": f"a photo of a {'cat' if name[0].isupper() else 'dog'}",
                "seg_file_name": f"seg/{name}.png",
                "segments_file_name": f"trimaps/{name}.png",
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(recipe: str, out: Path, data: Path, **settings: object) -> None:
    """Run a recipe, or go on with it."""
    if (out / "config.json").exists():
        return
    settings |= {"output_dir": out, "train_data_dir": data, "resolution": SIZE, "cache_dir": out.parent / "cache"}
    command = [sys.executable, "-m", "counterpoint", "train", recipe]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    begun = list(out.glob("checkpoint-*/complete.json"))
    subprocess.run([*command, *["--resume"] * bool(begun)], check=True)


def read(network: PerceptionModel, pictures: torch.Tensor) -> torch.Tensor:
    """Trimaps of pictures in 0..1."""
    with torch.no_grad():
        return network(pictures * 2 - 1).seg.argmax(1)


def main(pets: Path, out: Path) -> None:
    """The whole way."""
    data, test = prepare(pets, out / "train", held_out=False), prepare(pets, out / "test", held_out=True)
    family = out / "family"
    if not family.exists():
        shutil.copytree(TINY, family, ignore=shutil.ignore_patterns("controls", "judges", "probes"))
    train("photo-codec", out / "codec", data, max_train_steps=3000)
    assemble(out, family)
    on = {"pretrained_model_name_or_path": family}
    train("photo-base", out / "base", data, max_train_steps=6000, torch_compile=True, **on)
    assemble(out, family)
    train("photo-controlnet", out / "control-seg", data, control_type="seg", max_train_steps=3000, **on)
    assemble(out, family)
    train("photo-segmenter", out / "segmenter", data, num_labels=CLASSES, max_train_steps=1000)

    held_out = ImageFolder(test, SIZE)
    photos = [held_out[number] for number in range(len(held_out))]
    trimaps = torch.from_numpy(np.stack([photo.segments for photo in photos]))
    hints = stack([photo.maps["seg"] for photo in photos])
    network = PerceptionModel.from_pretrained(out / "segmenter", local_files_only=True)
    pipe = cp.load(str(family), controls=["seg"])

    def generated(scale: float) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(number) for number in range(len(photos))]
        prompts = [photo.text for photo in photos]
        made = pipe(prompts, [hints], generator=seeds, controlnet_conditioning_scale=scale, output_type="pt")
        return made.images

    real = stack([photo.image for photo in photos])
    with torch.no_grad():
        decoded = pipe.decode(pipe.encode(real * 2 - 1), "pt").float()
    sets = {"prompt alone": generated(0.0), "with the trimap": generated(1.0), "photos through the codec": decoded}
    rows = {name: overlap(read(network, pictures), trimaps, CLASSES) for name, pictures in sets.items()}
    for name, row in rows.items():
        spread = bootstrap(row, miou)
        print(f"{name}: mIoU {spread.mean:.3f} [{spread.low:.3f}, {spread.high:.3f}]")
    both = torch.stack([rows["with the trimap"], rows["prompt alone"]], 1)
    gain = bootstrap(both, lambda drawn: miou(drawn[:, 0]) - miou(drawn[:, 1]))
    print(f"above the floor: {gain.mean:.3f} [{gain.low:.3f}, {gain.high:.3f}]")
    columns = [hints, *sets.values(), real]
    sheet = np.concatenate([np.concatenate(unstack(column[:10]), 0) for column in columns], 1)
    PIL.Image.fromarray(sheet).save(out / "sheet.jpg", quality=90)
    print(out / "sheet.jpg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
