"""``megalr data`` as a program of a checkout: ``python tools/preprocess_c4.py --help``."""

from megalr.cli.data import data_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(data_command)
