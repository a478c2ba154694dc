"""``megalr export`` as a program of a checkout: ``python tools/export_hf.py --help``."""

from megalr.cli.formats import export_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(export_command)
