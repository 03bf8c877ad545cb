"""``python -m pyrolora``: the command line, also under ``torchrun -m pyrolora``."""

from pyrolora.cli import main

main()
