"""Where the elements of parameters lie on ranks, and moving them to their owners and back.

In: flat storages and their layouts. Out: descriptions of fragments, whole matrices on one rank.
Must not know DeepSpeed, models or update rules.
"""
