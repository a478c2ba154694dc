"""``megalr memory`` as a program of a checkout: ``python tools/estimate_memory.py --help``."""

from megalr.cli.memory import memory_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(memory_command)
