"""``megalr import`` as a program of a checkout: ``python tools/import_hf.py --help``."""

from megalr.cli.formats import import_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(import_command)
