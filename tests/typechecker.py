"""What jaxtyping's import hook applies: beartype, taking an int where a float is wanted, as PEP 484 does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
