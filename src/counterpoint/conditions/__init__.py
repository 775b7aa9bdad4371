"""From a photo to a condition image, one extractor a file."""
