"""Hugging Face in and out.

In: a transformers folder, or a run's checkpoint. Out: a decoder to start from, or a transformers
folder with tokenizer and model card. Must not know the training loop.
"""
