"""Denoisers, guidance and the one sampling loop."""
