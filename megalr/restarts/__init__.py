"""Weight refactorization, momentum reset and ReLoRA's merges during a run.

In: the engine's state as fragments, factor pairs, the section ``restarts``. Out: balanced masters,
zeroed moments, reports. Must not know the loop, checkpoints or the engine's internals.
"""
