"""Text to token shards, offline.

In: files of text or tokens, a SentencePiece model. Out: Megatron ``.bin/.idx`` shards with a
manifest. Must not know models, training or torch.
"""
