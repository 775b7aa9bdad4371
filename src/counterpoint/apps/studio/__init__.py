"""The studio: a page in the browser for pictures under several controls."""
