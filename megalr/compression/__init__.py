"""A dense model of transformers becomes a factorized one, without training.

In: a transformers folder, and text to calibrate with. Out: a factorized folder of the same format
as an export, with its card. Must not know decoders, engines or the loop.
"""
