"""Building blocks of the decoder: dense and factorized linear layers, norms, embedding, head.

In: sizes, how they are sharded, a seed. Out: modules, and descriptions of the matrices they store.
Must not know the decoder, the optimizer or the engine.
"""
