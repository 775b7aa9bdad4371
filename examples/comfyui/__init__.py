"""Counterpoint's node for ComfyUI: copy this folder into its ``custom_nodes``, with counterpoint installed there."""

from counterpoint.apps.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
