"""Tensor parallelism: the mesh of ranks, the collectives, and what a rank holds of a tensor."""
