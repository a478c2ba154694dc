"""Memory of one rank, estimated before a run.

In: the run's configuration, the DeepSpeed JSON, the number of GPUs. Out: bytes of every kind of
buffer and the peak. Must not know the training loop, and builds neither a model nor an engine.
"""
