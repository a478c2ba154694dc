"""``megalr sweep`` as a program of a checkout: ``python tools/sweep.py --help``."""

from megalr.cli.sweep import sweep_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(sweep_command)
