"""Perplexity during a run and afterwards, and the harness lm-eval.

In: a model and batches, or a checkpoint or transformers folder. Out: losses over all ranks. Must
not know the training loop.
"""
