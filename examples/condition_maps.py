"""Every condition image that needs no model, of a folder's first ten photos, with the poses and segments that came with
them, and what balancing keeps of their edges.

    python examples/condition_maps.py PHOTOS SHEET.jpg

``PHOTOS`` is anything that training reads (see docs/photos.md), such as COCO 2017; segments are found
where none came with a photo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.Image

from counterpoint.conditions.plain import PLAIN
from counterpoint.data.balance import keep_some, segment, silence
from counterpoint.data.samples import open_photos

SIZE, SHOWN, ROWS = 512, 160, 10


def main(photos: Path, sheet: Path) -> None:
    """A row a photo."""
    source = open_photos(photos, SIZE)
    rows = []
    for number in range(min(ROWS, len(source))):
        photo = source[number]
        maps = {kind: extract(photo.image) for kind, extract in PLAIN.items()}
        segments = segment(photo.image) if photo.segments is None else photo.segments
        heard = keep_some(segments, np.random.default_rng(number))
        colours = np.random.default_rng(0).integers(40, 256, (4096, 3)).astype(np.uint8)
        pose = photo.maps.get("pose", np.zeros_like(photo.image))
        row = [photo.image, *maps.values(), pose, colours[segments % 4096], silence(maps["canny"], heard, "canny")]
        rows.append(np.concatenate([cv2.resize(one, (SHOWN, SHOWN), interpolation=cv2.INTER_AREA) for one in row], 1))
    titles = ["photo", *PLAIN, "pose", "segments", "canny, balanced"]
    head = np.full((24, rows[0].shape[1], 3), 255, np.uint8)
    for column, title in enumerate(titles):
        cv2.putText(head, title, (column * SHOWN + 4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA)
    PIL.Image.fromarray(np.concatenate([head, *rows], 0)).save(sheet, quality=75)
    print(sheet)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
