"""Reading condition images and photos: any size, any mode, and nothing but an image."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from counterpoint.types import Image, UserError, meaning

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
"""Of Pillow's: those that say how large a picture is before they decode it, and start no other program."""
Fit = Literal["fill", "fit", "stretch"]


def read_image(path: Path) -> Image:
    """Read a PNG, JPEG, WebP or another of :data:`FORMATS`, as RGB.

    EXIF rotation is applied, 16-bit greys are scaled to 8 bits, palettes are looked up, and transparent pixels become
    black, which means "no control" wherever anything does.

    Raises:
        UserError: the file is missing, not an image, truncated, empty, or larger than :data:`MAX_PIXELS`.
    """
    if not path.is_file():
        raise UserError(f"there is no image {path}" if not path.is_dir() else f"{path} is a folder, not an image")
    return _decoded(path, str(path))


def decode_image(content: bytes, name: str, most: int = MAX_PIXELS) -> Image:
    """The same of a file's content, which messages call ``name``, of at most so many pixels.

    Raises:
        UserError: it is not an image, truncated, empty, or larger; nothing larger is decoded.
    """
    return _decoded(io.BytesIO(content), name, most)


def _decoded(source: Path | io.BytesIO, name: str, most: int = MAX_PIXELS) -> Image:
    with opened(source, name, most) as picture:
        return _rgb(PIL.ImageOps.exif_transpose(picture))


@contextmanager
def opened(source: Path | io.BytesIO, name: str, most: int = MAX_PIXELS) -> Iterator[PIL.Image.Image]:
    """An image of one of :data:`FORMATS` as Pillow has it, for those who want more than its colours.

    Raises:
        UserError: it is not an image, truncated, or larger; also if that is found while it is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(source, formats=FORMATS) as picture:
                if picture.width * picture.height > most:
                    raise UserError(
                        f"{name} has {picture.width} x {picture.height} pixels; the limit is {most:,}: "
                        "scale it down first"
                    )
                yield picture
    except UserError:
        raise
    except PIL.Image.DecompressionBombError:
        raise UserError(f"{name} has more pixels than the limit of {most:,}: scale it down first") from None
    except PIL.UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read ({', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        raise UserError(f"{name} is damaged or incomplete: {error}") from None


def read_shape(path: Path) -> tuple[int, int]:
    """Height and width of what :func:`read_image` would give; nothing is decoded.

    Raises:
        UserError: the file is not an image, or too large.
    """
    with opened(path, str(path)) as picture:
        turned = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) in range(5, 9)
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def _rgb(picture: PIL.Image.Image) -> Image:
    if picture.mode.startswith(("I", "F")):  # 16 and 32 bits a pixel: Pillow's own conversion would clip
        grey = np.asarray(picture, np.float64)
        if not np.isfinite(grey).all():
            raise ValueError("it holds values that are not numbers")
        top = 65535 if picture.mode != "F" else max(float(grey.max()), 1.0)
        return np.repeat(np.clip(np.rint(grey * 255 / top), 0, 255).astype(np.uint8)[..., None], 3, -1)
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.array(picture.convert("RGB"))


def resize(picture: Image, width: int, height: int, how: Fit = "fill", kind: str | None = None) -> Image:
    """Bring a picture to a size.

    Args:
        picture: RGB.
        width: in pixels.
        height: likewise.
        how: ``"fill"`` covers the size and crops what hangs over, ``"fit"`` shows all of it on black, ``"stretch"``
            ignores proportions.
        kind: the kind of control: label colours are never mixed.

    Smooth kinds shrink by averaging and grow by Lanczos interpolation.
    """
    tall, wide = picture.shape[:2]
    if (wide, tall) == (width, height):
        return picture
    nearest = kind is not None and meaning(kind).resample == "nearest"
    if how == "stretch":
        return _scale(picture, width, height, nearest)
    scale = (max if how == "fill" else min)(width / wide, height / tall)
    new = max(1, round(wide * scale)), max(1, round(tall * scale))
    picture = _scale(picture, *new, nearest)
    left, top = abs(new[0] - width) // 2, abs(new[1] - height) // 2
    if how == "fill":
        return picture[top : top + height, left : left + width]
    result = np.zeros((height, width, 3), np.uint8)
    result[top : top + new[1], left : left + new[0]] = picture
    return result


def resize_shorter(picture: Image, resolution: int = 512) -> Image:
    """A photo as ControlNet 1.1's annotators are shown it.

    The shorter side becomes ``resolution``, then both are rounded to the nearest multiple of 64, 64 at least; Lanczos
    interpolation if it grows, else averaging.

    Raises:
        UserError: it would have more pixels than :data:`MAX_PIXELS`.
    """
    scale = resolution / min(picture.shape[:2])
    height, width = (max(64, round(side * scale / 64) * 64) for side in picture.shape[:2])
    if height * width > MAX_PIXELS:
        raise UserError(f"at {resolution} pixels the photo has {width} x {height}; the limit is {MAX_PIXELS:,} pixels")
    how = cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA
    return cv2.resize(picture, (width, height), interpolation=how)


def _scale(picture: Image, width: int, height: int, nearest: bool) -> Image:
    smaller = width * height < picture.shape[0] * picture.shape[1]
    how = cv2.INTER_NEAREST if nearest else cv2.INTER_AREA if smaller else cv2.INTER_LANCZOS4
    return cv2.resize(picture, (width, height), interpolation=how)
