"""One trainer; what varies is the stage it is given."""
