"""``megalr factorize`` as a program of a checkout: ``python tools/factorize_hf.py --help``."""

from megalr.cli.formats import factorize_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(factorize_command)
