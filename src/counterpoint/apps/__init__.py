"""The edges: command line, pages, service."""
