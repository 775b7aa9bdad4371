"""The words of the scenes: backgrounds, things, colours, surfaces, actions, styles, and their segmentation classes.

Every table here is literal: captions, painters, judges and tests all read it, so that a word means the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = 128
"""Side of a scene in pixels."""

BACKGROUNDS = {
    "meadow": "on a meadow",
    "beach": "on a beach",
    "snow": "in the snow",
    "desert": "in the desert",
    "street": "on a street",
    "room": "in a room",
    "forest": "in a forest",
    "night": "under a night sky",
}
"""Background name -> how a caption says it."""

STYLES = {"photo": "a photo of", "watercolour": "a watercolour painting of", "line drawing": "a line drawing of"}
"""Style name -> how a caption opens."""

TEXTURES = ("plain", "striped", "dotted", "checkered")
ACTIONS = ("holding", "kicking", "sitting on", "behind")


@dataclass(frozen=True)
class Colour:
    """A named colour as an interval in OpenCV's 8-bit HSV (H 0..180, S and V 0..255).

    The painters keep hue and saturation and let light move V inside ``value``, so a surface never leaves the interval.
    """

    hue: tuple[int, int]
    saturation: tuple[int, int]
    value: tuple[int, int]


COLOURS = {
    "red": Colour((0, 4), (190, 250), (120, 235)),
    "blue": Colour((105, 122), (150, 240), (100, 235)),
    "green": Colour((46, 74), (130, 220), (80, 200)),
    "yellow": Colour((26, 32), (160, 245), (180, 252)),
    "black": Colour((0, 180), (0, 60), (6, 29)),
    "white": Colour((0, 180), (0, 16), (224, 252)),
    "brown": Colour((9, 16), (110, 190), (60, 145)),
    "purple": Colour((138, 152), (110, 200), (90, 195)),
}
"""The seven colours of COCO-MIG, each inside that benchmark's HSV range, and purple."""


@dataclass(frozen=True)
class Kind:
    """A kind of thing: real width and height in metres, as the camera sees it from the side."""

    width: float
    height: float
    floats: bool = False


KINDS = {
    "ball": Kind(0.62, 0.62),
    "box": Kind(0.80, 0.72),
    "chair": Kind(0.62, 1.12),
    "table": Kind(1.30, 0.80),
    "car": Kind(2.10, 1.00),
    "umbrella": Kind(1.05, 1.05),
    "balloon": Kind(0.58, 1.20, floats=True),
    "bag": Kind(0.56, 0.66),
    "cone": Kind(0.56, 0.80),
    "lamp": Kind(0.60, 1.50),
}

SEG_CLASSES = {
    "sky": (6, 230, 230),
    "wall": (120, 120, 120),
    "building": (180, 120, 120),
    "floor": (80, 50, 50),
    "tree": (4, 200, 3),
    "road": (140, 140, 140),
    "grass": (4, 250, 7),
    "sand": (160, 150, 20),
    "snow": (190, 170, 255),
    "mountain": (143, 255, 140),
    "sea": (9, 7, 230),
    "earth": (120, 120, 70),
    "window": (230, 230, 230),
    "person": (150, 5, 61),
    "ball": (255, 0, 245),
    "box": (255, 122, 8),
    "chair": (204, 70, 3),
    "table": (255, 6, 82),
    "car": (0, 102, 200),
    "umbrella": (163, 0, 255),
    "balloon": (255, 173, 214),
    "bag": (70, 184, 160),
    "cone": (0, 92, 61),
    "lamp": (224, 255, 8),
}
"""Segmentation class -> RGB. ADE20K's palette where ADE20K has the class, free colours elsewhere and for boxes, which
ADE20K paints like grass."""

SEG_INDEX = {name: index for index, name in enumerate(SEG_CLASSES)}
PERSON = SEG_INDEX["person"]
