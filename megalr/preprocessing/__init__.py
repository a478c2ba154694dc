"""Text to token shards, offline.

In: files of text or of another program's tokens, and a tokenizer. Out: a data folder of Megatron
``.bin``/``.idx`` shards with a manifest. Must not know: models, training, torch.
"""
