"""The mesh of ranks, differentiable collectives, and the plan of which weights are sharded how.

In: the number of ranks and sizes of matrices. Out: meshes, plans and collectives. Must not know
layers, the optimizer or DeepSpeed.
"""
