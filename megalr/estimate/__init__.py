"""Memory and speed of a run, estimated before it.

In: the run's configuration, the DeepSpeed JSON, the number of GPUs. Out: bytes of every kind of
buffer and the peak; seconds of an update; ways to run that fit a GPU. Must not know the training
loop, and builds neither a model nor an engine.
"""
