"""``megalr evaluate`` as a program of a checkout, for any launcher.

torchrun --nproc_per_node 4 -- launchers/evaluate.py --model out/ --data data/c4
"""

from megalr.cli.evaluate import evaluate_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(evaluate_command)
