"""Text to token shards, offline.

In: documents of the readers, and a tokenizer. Out: a data folder of Megatron ``.bin``/``.idx``
shards with a manifest. Must not know: models, training, torch.
"""
