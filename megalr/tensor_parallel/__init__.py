"""The mesh of ranks, its collectives, and which matrices are cut how.

In: sizes of the world and of matrices. Out: plans and differentiable collectives. Must not know
layers, the optimizer or DeepSpeed.
"""
