"""Processes of a run: launcher variables, rendezvous, process group, agreement, stopping.

In: environment variables and signals. Out: a torch process group, and decisions that are the same
on every rank. Must not know: models, DeepSpeed, the configuration.
"""
