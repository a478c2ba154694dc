"""A run, step by step: forward, backward, step or skip, and what is due after it.

In: a configuration, a DeepSpeed JSON, a stop request. Out: events, checkpoints, an exit code.
Must not know: attributes of DeepSpeed, names of methods, where elements of a parameter lie.
"""
