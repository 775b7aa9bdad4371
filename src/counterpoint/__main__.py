"""``python -m counterpoint``."""

from counterpoint.apps.cli.main import main

main()
