"""Pure measures of images and maps: ``update(batch)``, ``compute()``; networks are handed in."""
