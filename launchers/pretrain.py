"""``megalr train`` for any launcher: ``deepspeed launchers/pretrain.py --config ...``.

Continue a run: ``deepspeed launchers/pretrain.py --resume runs/llama_60m``. Also started by
torchrun, by mpirun, by srun, or by plain python for one process.
"""

from megalr.cli.train import pretrain_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(pretrain_command)
