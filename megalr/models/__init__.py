"""Decoders of the LLaMA, Mistral, Qwen, SmolLM3, OLMo-2, Phi-3 and GPT-2 families; presets; FLOPs.

In: sizes, a method's settings, a tensor-parallel mesh. Out: a decoder that maps token ids to logits
or to the summed loss. Must not know the optimizer, the engine or the training loop.
"""
