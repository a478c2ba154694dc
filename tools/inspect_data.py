"""``megalr inspect`` as a program of a checkout: ``python tools/inspect_data.py --help``."""

from megalr.cli.data import inspect_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(inspect_command)
