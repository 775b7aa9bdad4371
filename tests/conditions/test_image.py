"""Images of every kind that users have, and files that are none."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from counterpoint.conditions.canny import canny
from counterpoint.conditions.image import read_image, resize, resize_shorter
from counterpoint.conditions.openpose import draw_pose
from counterpoint.conditions.soft_edge import soft_edge
from counterpoint.types import UserError

RAMP = np.repeat(np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], 30, 0), 3, -1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "bmp", "gif", "tiff", "ppm"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP).save(path)
    assert np.abs(read_image(path).astype(int) - RAMP).max() <= 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16", "YCbCr"])
def test_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode in {"CMYK", "YCbCr"} else "a.png")
    if mode == "I;16":
        Image.fromarray(RAMP[..., 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(RAMP).convert(mode).save(path)
    result = read_image(path)
    assert result.shape == (30, 40, 3)
    if mode not in {"1", "P"}:
        assert np.abs(result.astype(int) - RAMP).max() <= 12


def test_rotation_of_the_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (40, 30, 3)


def test_transparent_is_black(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert not read_image(tmp_path / "a.png").any()


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_files_that_are_no_images(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(tmp_path / "whole.jpg")
    cases = {
        "text.png": (b"hello", "not an image"),
        "empty.png": (b"", "not an image"),
        "cut.png": (whole[: len(whole) // 2], "damaged"),
        "cut.jpg": ((tmp_path / "whole.jpg").read_bytes()[:3000], "damaged"),
        "huge.png": (huge_png(30000, 30000), "limit"),
        "wide.png": (huge_png(9000, 9000), "limit"),
        "zero.png": (huge_png(0, 10), "damaged|not an image"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(UserError, match="there is no image"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", ["ico", "icns", "eps"])
def test_what_decodes_before_it_is_measured_is_no_image(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Icons do when they are opened, and PostScript is a program."""
    Image.fromarray(RAMP).resize((64, 64)).save(tmp_path / f"a.{suffix}")

    def decoded(*_: object) -> None:
        raise AssertionError("it is decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(UserError, match="is not an image that can be read"):
        read_image(tmp_path / f"a.{suffix}")


def test_resizing() -> None:
    assert resize(RAMP, 40, 30) is RAMP
    assert resize(RAMP, 64, 64, "fill").shape == (64, 64, 3)
    fitted = resize(np.full((30, 60, 3), 255, np.uint8), 64, 64, "fit")
    assert fitted.shape == (64, 64, 3)
    assert not fitted[0].any()
    assert fitted[32].all()
    assert resize(RAMP, 16, 128, "stretch").shape == (128, 16, 3)
    assert resize(np.zeros((1, 500, 3), np.uint8), 64, 64, "fit").shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("tall", "wide", "resolution", "wanted"),
    [(480, 640, 512, (512, 704)), (512, 512, 512, (512, 512)), (342, 512, 512, (512, 768)),
     (1000, 3000, 256, (256, 768)), (600, 600, 544, (512, 512)), (600, 600, 545, (576, 576)), (9, 9, 10, (64, 64))],
)  # fmt: skip
def test_the_size_that_published_annotators_see(tall: int, wide: int, resolution: int, wanted: tuple[int, int]) -> None:
    """By hand: 640 * 512 / 480 is 682.7, 10.67 times 64, so 704; 544 is 8.5 times 64, which rounds to even."""
    photo = np.random.default_rng(0).integers(0, 256, (tall, wide, 3), np.uint8)
    made = resize_shorter(photo, resolution)
    assert made.shape == (*wanted, 3)
    how = cv2.INTER_LANCZOS4 if resolution > min(tall, wide) else cv2.INTER_AREA
    np.testing.assert_array_equal(made, cv2.resize(photo, wanted[::-1], interpolation=how))


def test_a_strip_does_not_fill_the_memory() -> None:
    with pytest.raises(UserError, match="the limit is 64,000,000 pixels"):
        resize_shorter(np.zeros((1, 4000, 3), np.uint8))


def test_labels_are_not_mixed() -> None:
    colours = np.random.default_rng(0).integers(0, 255, (31, 57, 3), np.uint8)
    new = {tuple(c) for c in resize(colours, 64, 64, "fill", "seg").reshape(-1, 3)}
    assert new <= {tuple(c) for c in colours.reshape(-1, 3)}


def test_canny_is_opencvs_on_bgr(test_data: Path) -> None:
    photo = read_image(test_data / "golden_refiners" / "cutecat_init.png")
    golden = read_image(test_data / "golden_refiners" / "cutecat_guide_canny.png")
    np.testing.assert_array_equal(canny(photo), golden)
    np.testing.assert_array_equal(canny(resize_shorter(photo)), golden)


def test_soft_edges_are_soft_and_silent_where_nothing_is() -> None:
    flat = soft_edge(np.full((32, 32, 3), 90, np.uint8))
    assert not flat.any()
    step = np.zeros((32, 32, 3), np.uint8)
    step[:, 16:] = 255
    edge = soft_edge(step)[16, :, 0]
    assert edge[15:17].min() > 200
    assert 0 < edge[12] < 200
    assert edge[2] == 0


def test_pose_is_drawn_where_joints_are() -> None:
    joints = np.full((18, 2), np.nan)
    joints[[1, 2]] = [[20, 20], [40, 20]]
    picture = draw_pose([joints], 64, 64)
    assert picture[20, 30].any()
    assert not picture[40].any()
    assert tuple(picture[20, 20]) == (255, 85, 0)
    assert cv2.countNonZero(picture[..., 0]) > 20
