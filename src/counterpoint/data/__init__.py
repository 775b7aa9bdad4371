"""Samples: procedural scenes, folders, shards, benchmark pairs."""
