"""Training recipes by name."""

from __future__ import annotations

from counterpoint.recipes import members, methods, photos, sd15, tiny

RECIPES = {
    recipe.name: recipe
    for recipe in (
        *(tiny.CODEC, tiny.TOWERS, tiny.BASE, tiny.CONTROLNET, tiny.JUDGE, members.ADAPTER),
        *methods.TINY,
        *(photos.CODEC, photos.BASE, photos.CONTROLNET, photos.SEGMENTER),
        *sd15.SD15,
    )
}
"""Name -> recipe."""
