"""Where the elements of parameters lie on ranks, and moving them to their owners and back.

In: flat tensors and descriptions of their contents. Out: fragments, whole matrices on one rank.
Must not know the engine, models or update rules.
"""
