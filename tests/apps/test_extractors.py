"""Extractors with the user's networks, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from counterpoint.apps import extractors
from counterpoint.apps.extractors import extractor
from counterpoint.apps.readers import control_readers
from counterpoint.conditions.image import read_image
from counterpoint.conditions.normals import normals
from counterpoint.conditions.plain import PLAIN
from counterpoint.conditions.recognise import WrongPicture
from counterpoint.conditions.scribble import strokes
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.models.edge_networks import EDGE_NETWORKS
from counterpoint.types import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", EDGE_NETWORKS)
def test_published_networks_draw_any_size(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(EDGE_NETWORKS[kind]().state_dict(), tmp_path / "file.safetensors")
    drawn = extractor(kind, str(tmp_path / "file.safetensors"))(PHOTO)
    assert drawn.shape == PHOTO.shape
    assert drawn.dtype == np.uint8
    assert (drawn[..., 0] == drawn[..., 1]).all()
    assert not np.array_equal(drawn, PLAIN[kind](PHOTO))


def test_one_network_serves_two_kinds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(EDGE_NETWORKS["hed"]().state_dict(), tmp_path / "file.safetensors")
    soft, thick = (extractor(kind, str(tmp_path / "file.safetensors"))(PHOTO) for kind in ("hed", "scribble"))
    np.testing.assert_array_equal(thick, strokes(soft))


def test_normals_come_from_whatever_reads_depth(tiny: Path) -> None:
    scene_ = scene(SPLITS["test"].start).image
    made, depth = (extractor(kind, "tiny")(scene_) for kind in ("normal", "depth"))
    np.testing.assert_array_equal(made, normals(depth))


@pytest.mark.parametrize("kind", ["depth", "normal", "seg", "pose"])
def test_a_judge_reads_where_a_family_is_named_and_nowhere_else(kind: str, tiny: Path) -> None:
    made = extractor(kind, "tiny")(PHOTO)
    assert made.shape == PHOTO.shape, "sides need not be multiples of 16"
    with pytest.warns(WrongPicture, match="knows its family's scenes only"):
        own = extractor(kind, model="tiny")
    np.testing.assert_array_equal(made, own(PHOTO))
    with pytest.raises(UserError, match=r"fetch .* and name it with --model MODEL; --model tiny reads"):
        extractor(kind)


def test_a_judge_reads_scenes_as_before(tiny: Path) -> None:
    picture = torch.from_numpy(scene(SPLITS["test"].start).image).permute(2, 0, 1)[None] / 255
    small = picture[..., :120, :100]
    read = control_readers(tiny, {})["depth"]
    assert read(small).shape == (1, 3, 120, 100)
    whole = torch.nn.functional.pad(small, (0, 12, 0, 8), mode="replicate")
    torch.testing.assert_close(read(small), read(whole)[..., :120, :100])


@pytest.mark.parametrize("kind", EDGE_NETWORKS)
@pytest.mark.parametrize("side", [1, 8])
def test_published_networks_draw_the_smallest_photos(kind: str, side: int, tmp_path: Path) -> None:
    save_file(EDGE_NETWORKS[kind]().state_dict(), tmp_path / "file.safetensors")
    photo = PHOTO[:side, :side]
    assert extractor(kind, str(tmp_path / "file.safetensors"))(photo).shape == photo.shape


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("smell", None, "unknown control 'smell'"),
        ("canny", "x", "no model makes canny images here"),
        ("hed", "x.pth", "is a pickle"),
        ("pose", "nowhere,x", "there is no model 'nowhere'"),
        ("sam", "nowhere", "there is no model 'nowhere'"),
        (
            "sam",
            None,
            "nothing makes sam images of photos without a model: fetch facebook/sam-vit-base, .* --model MODEL$",
        ),
        ("depth", "nowhere", "there is no model 'nowhere'"),
    ],
)
def test_what_cannot_be_extracted(kind: str, source: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        extractor(kind, source)


def test_a_model_is_named_where_one_is_needed(saved: Path) -> None:
    with pytest.raises(UserError, match=r"fetch Intel/.* it with --extractor depth=MODEL; .* depth=tiny reads"):
        extractor("depth", model=str(saved))
    with pytest.raises(UserError, match="nothing makes pose images of photos without a model"):
        extractor("pose", model=str(saved))


def test_the_size_at_which_a_photo_is_read(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PIL.Image.fromarray(PHOTO).save("photo.png")
    monkeypatch.setattr(extractors, "extractor", lambda *_: lambda photo: photo)
    for arguments, wanted in (
        (("canny",), PHOTO.shape),
        (("canny", "--resolution", 128), (192, 128, 3)),
        (("lineart",), PHOTO.shape),
        (("lineart", "--model", "lines.safetensors", "--resolution", 64), (64, 64, 3)),
        (("lineart", "--model", "lines.safetensors"), (704, 512, 3)),
        (("depth", "--model", "DPT"), PHOTO.shape),
    ):
        status, out, error = cli("extract", arguments[0], "photo.png", *arguments[1:])
        assert status == 0, error
        assert read_image(Path(out.strip())).shape == wanted
    monkeypatch.undo()
    status, _, error = cli("extract", "depth", tmp_path / "photo.png")
    assert status == 2
    assert "name it with --model MODEL" in error
