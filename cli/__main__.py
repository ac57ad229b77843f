"""``python -m qatc.cli``."""

from qatc.cli.main import main

main()
