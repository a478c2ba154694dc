"""Decoders of the LLaMA, Mistral, Qwen2 and GPT-2 families, their presets and FLOP counts.

In: sizes, a method's settings, a tensor-parallel mesh. Out: a decoder that maps token ids to logits
or to the summed loss. Must not know the optimizer, the engine or the training loop.
"""
