"""``megalr tokenizer`` as a program of a checkout: ``python tools/train_tokenizer.py --help``."""

from megalr.cli.data import tokenizer_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(tokenizer_command)
