"""Suites, the making of their pictures, and statistics."""
