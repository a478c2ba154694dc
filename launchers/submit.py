"""``megalr submit`` as a program of a checkout: ``python launchers/submit.py --help``."""

from megalr.cli.submit import submit_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(submit_command)
