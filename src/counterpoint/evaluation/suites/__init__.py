"""One suite a file: what to make, and how it is scored."""
