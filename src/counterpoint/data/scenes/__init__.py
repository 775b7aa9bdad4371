"""Procedural scenes with exact annotations: the data set of the tiny family."""
