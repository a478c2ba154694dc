"""``megalr reshape`` as a program of a checkout: ``python tools/reshape_checkpoint.py --help``."""

from megalr.cli.formats import reshape_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(reshape_command)
