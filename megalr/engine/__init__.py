"""The only room that knows DeepSpeed.

In: a decoder, the run's configuration and the user's DeepSpeed JSON. Out: an engine, its state as
fragments, whether a step was skipped, its checkpoint files. Must not know restarts or the loop.
"""
