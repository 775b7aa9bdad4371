"""Pictures come in any form that diffusers takes, and in bytes; what would be noise is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from counterpoint.sampling.pixels import Pixels
from counterpoint.types import UserError

SIZE = (32, 48)
BYTES = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
GREY = BYTES[..., 0]
CHW = torch.from_numpy(BYTES).permute(2, 0, 1)
COLOURED = [
    PIL.Image.fromarray(BYTES),
    np.asarray(PIL.Image.fromarray(BYTES)),
    BYTES,
    BYTES / 255,
    np.float32(BYTES / 255),
    CHW,
    CHW / 255,
    (CHW / 255)[None],
]
BLACK = np.zeros((*SIZE, 3))


@pytest.mark.parametrize("image", COLOURED)
def test_one_picture_in_every_form(image: Any) -> None:
    made = Pixels(8).hint("pose", image, SIZE, 2)
    torch.testing.assert_close(made.float(), (CHW / 255)[None].repeat(2, 1, 1, 1), rtol=0, atol=1e-6)
    started = Pixels(8).picture([image] if isinstance(image, PIL.Image.Image) else image, SIZE)
    torch.testing.assert_close(started.float(), (CHW / 127.5 - 1)[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "grey", [PIL.Image.fromarray(GREY), GREY, GREY / 255, GREY[..., None], torch.from_numpy(GREY.copy())]
)
def test_grey_is_a_hint_and_a_mask(grey: Any) -> None:
    wanted = torch.from_numpy(GREY / 255).float()
    hint = Pixels(8).hint("pose", grey, SIZE, 1)
    torch.testing.assert_close(hint.float(), wanted.expand(1, 3, *SIZE), rtol=0, atol=1e-6)
    region = Pixels(8).region("pose", grey, BLACK, SIZE, 1)
    torch.testing.assert_close(region.float(), wanted[None, None], rtol=0, atol=1e-6)


def test_coloured_and_true_or_false_masks() -> None:
    where = GREY > 100
    for mask in (where, torch.from_numpy(where), np.stack([where] * 3, -1), PIL.Image.fromarray(where)):
        assert torch.equal(Pixels(8).mask(mask, SIZE, 1)[0, 0], torch.from_numpy(where).float())


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("pose.png", "is a str"),
        (None, "is a NoneType"),
        (BYTES.astype(np.float32), "from 0 to 255"),
        (CHW / 127.5 - 1, "values from -1 to 1"),
        (CHW / 255 * float("nan"), "from nan"),
        (BYTES.astype(np.int64), "int64"),
        (np.dstack([BYTES, GREY]), "4 channels: give 1 or 3, in the order (h, w, c)"),
        (CHW.numpy(), "48 channels"),
        (CHW.permute(1, 2, 0), "32 channels: give 1 or 3, in the order (c, h, w)"),
    ],
)
def test_what_would_be_noise_is_refused(image: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        Pixels(8).hint("pose", [image], SIZE, 1)
    assert "image for the control pose" in str(error.value)
    assert said in str(error.value)
