"""``python -m qatc``, and ``torchrun -m qatc``."""

from qatc.cli.main import main

main()
