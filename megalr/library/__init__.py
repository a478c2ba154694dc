"""megalr in programs of others: factorized layers, restarts and optimizers for any PyTorch model.

In: a torch model and a plain torch optimizer, on one process, under DDP or FSDP2. Out: the model
with factorized linears, restarts of the pair. Must not know: the engine, DeepSpeed, configurations
of runs, transformers.
"""
