"""Training recipes by name."""

from __future__ import annotations

from counterpoint.recipes import tiny

RECIPES = {recipe.name: recipe for recipe in (tiny.CODEC, tiny.TOWERS, tiny.BASE, tiny.CONTROLNET, tiny.JUDGE)}
"""Name -> recipe."""
