"""Loading, converting and describing weights, and the networks that diffusers lacks."""
