"""A run's folder on disk: its files, its lock, its environment, its metrics, where a start begins.

In: configuration and events. Out: a folder that a later start, a report or an export can read.
Must not know: the engine's internals, the training loop.
"""
