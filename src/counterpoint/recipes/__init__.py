"""Training recipes by name."""

from __future__ import annotations

from counterpoint.recipes import aligned, minimal_impact, photos, tiny

RECIPES = {
    recipe.name: recipe
    for recipe in (
        *(tiny.CODEC, tiny.TOWERS, tiny.BASE, tiny.CONTROLNET, tiny.JUDGE),
        *(aligned.PROBE, aligned.ALIGNED, minimal_impact.MINIMAL_IMPACT),
        *(photos.CODEC, photos.BASE, photos.CONTROLNET, photos.SEGMENTER),
    )
}
"""Name -> recipe."""
