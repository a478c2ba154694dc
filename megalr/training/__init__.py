"""The training loop and what belongs to it: engine, evaluation, checkpoints, metrics."""
