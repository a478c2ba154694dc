"""Weight refactorization and momentum reset on the sharded state of a DeepSpeed engine."""
