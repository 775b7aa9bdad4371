"""The tiny family on a user's photos: every recipe runs, and latents are those of the photos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderTiny

from counterpoint.conditions.image import read_image, resize
from counterpoint.data.photos import Photo
from counterpoint.recipes import RECIPES, photos
from counterpoint.training.config import override
from counterpoint.training.order import Draws
from counterpoint.training.stages.codec import pictures
from counterpoint.types import UserError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (64, 80, 3)).astype(np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{i}.png")
        PIL.Image.fromarray(noise[..., 0] % 3).save(folder / f"{i}-segments.png")
        rows.append({"file_name": f"{i}.png", "text": "a photo", "segments_file_name": f"{i}-segments.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(name: str, tiny: Path, place: Path, **more: object) -> object:
    return replace(
        RECIPES[name].config,
        train_data_dir=place,
        cache_dir=place.parent / "cache",
        pretrained_model_name_or_path=tiny,
        resolution=64,
        **more,
    )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("photo-codec", {}),
        ("photo-base", {}),
        ("photo-controlnet", {"control_type": "canny", "balanced": True}),
        ("photo-segmenter", {"num_labels": 3}),
    ],
)
def test_each_recipe_learns(name: str, more: dict, tiny: Path, place: Path) -> None:
    job = RECIPES[name].build(settings(name, tiny, place, **more))
    trained = [p for module in job.stage.trained_modules().values() for p in module.parameters()]
    loss, _ = job.stage(job.samples.batch([0, 3]), Draws(0, [0, 1]), 0)
    assert torch.isfinite(loss)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    assert sum(one is not None and bool(one.any()) for one in found) > 0.8 * len(found) * ("controlnet" not in name)


def test_latents_are_kept(tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("photo-base", tiny, place)
    monkeypatch.setattr(photos, "SHARD", 2)
    samples = photos.base(config).samples
    files = sorted((place.parent / "cache").rglob("*.npy"))
    assert len(files) == 3
    times = [file.stat().st_mtime_ns for file in files]
    again = photos.base(config).samples
    assert [file.stat().st_mtime_ns for file in files] == times
    vae = AutoencoderTiny.from_pretrained(tiny / "vae", local_files_only=True)
    image = photos.PhotoSamples(again.samples.photos, ("image",)).batch([4])["image"]
    with torch.no_grad():
        wanted = vae.encode(pictures(image)).latents * vae.config.scaling_factor
    found = samples.batch([3, 4])["latents"][1:].float()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    (place / "0.png").rename(place / "00.png")
    rows = (place / "metadata.jsonl").read_text().replace('"0.png"', '"00.png"')
    (place / "metadata.jsonl").write_text(rows)
    photos.base(config)
    assert len(list((place.parent / "cache").rglob("*.npy"))) == 6, "other files, other latents"


def test_latents_are_those_of_the_photos_with_the_control(tiny: Path, place: Path) -> None:
    rows = [json.loads(line) for line in (place / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row.pop("depth_file_name", None)
        if number in {1, 3}:
            row["depth_file_name"] = row["file_name"]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    every = photos.base(settings("photo-base", tiny, place)).samples
    some = photos.controlnet(settings("photo-controlnet", tiny, place, control_type="depth")).samples
    assert len(some) == 2
    assert torch.equal(some.batch([0, 1])["latents"], every.batch([1, 3])["latents"])
    first = photos.base(settings("photo-base", tiny, place, max_train_samples=2)).samples
    assert len(first.latents[0]) == 2, "fewer photos, other files"


def test_damage_is_counted_once_over_all_shards(tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "SHARD", 50)
    good = Photo(np.zeros((32, 32, 3), np.uint8), "a")
    vae = AutoencoderTiny.from_pretrained(tiny / "vae", local_files_only=True)
    for bad, most in (({7}, True), ({7, 60}, False)):
        samples = photos.PhotoSamples(Damaged(good, bad), ("caption",))
        if most:
            assert len(photos.EncodedPhotos(samples, vae, place / "1")) == 100
            continue
        with pytest.raises(UserError, match="2 of 100 photos are damaged, 1 may be"):
            photos.EncodedPhotos(samples, vae, place / "2")


class Damaged:
    """A hundred times the same photo, but for some that cannot be read."""

    def __init__(self, photo: Photo, bad: set[int]) -> None:
        self.photo, self.bad = photo, bad

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> Photo:
        if number in self.bad:
            raise UserError(f"{number} is damaged")
        return self.photo


def test_columns_are_those_of_the_published_scripts(tiny: Path, place: Path) -> None:
    row = {"picture": {"bytes": (place / "0.png").read_bytes()}, "prompt": "a photo of noise"}
    table = pa.Table.from_pylist([{**row, "hint": row["picture"]}])
    (place / "set" / "data").mkdir(parents=True)
    pq.write_table(table, place / "set" / "data" / "train-0.parquet")
    names = {"image_column": "picture", "caption_column": "prompt", "conditioning_image_column": "hint"}
    config = settings("photo-controlnet", tiny, place / "set", control_type="depth", **names)
    batch = photos.controlnet(config).samples.batch([0])
    assert batch["caption"] == ["a photo of noise"]
    assert batch["control:depth"].shape == (1, 64, 64, 3)
    with pytest.raises(UserError, match="this recipe learns no control"):
        photos.base(settings("photo-base", tiny, place / "set", **names))


def test_a_kind_of_ones_own(tiny: Path, place: Path) -> None:
    row = {"file_name": "0.png", "text": "noise", "glow_file_name": "1.png"}
    (place / "metadata.jsonl").write_text(json.dumps(row))
    job = photos.controlnet(settings("photo-controlnet", tiny, place, control_type="glow"))
    seen = job.samples.batch([0])["control:glow"][0]
    assert np.array_equal(seen, resize(read_image(place / "1.png"), *seen.shape[:2]))
    with pytest.raises(UserError, match=r"1 of 1 photos have no gloom image, and gloom is none of the kinds that can"):
        photos.controlnet(settings("photo-controlnet", tiny, place, control_type="gloom"))


def test_an_unknown_control(tiny: Path, place: Path) -> None:
    with pytest.raises(UserError, match="depth has no silent value"):
        photos.controlnet(settings("photo-controlnet", tiny, place, control_type="depth", balanced=True))
    job = photos.segmenter(settings("photo-segmenter", tiny, place, num_labels=2))
    with pytest.raises(UserError, match="a picture has segment 2; num_labels=2 counts from 0"):
        job.stage(job.samples.batch([0]), Draws(0, [0]), 0)
    with pytest.raises(UserError, match="'a:b' is one control of its kind"):
        override(RECIPES["photo-controlnet"].config, ["control_type=a:b"])
