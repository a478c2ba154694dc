"""SLTrain with restarts and Fira in Hugging Face's Trainer: python examples/trainer.py"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import megalr
from megalr.transformers import RestartsCallback

torch.manual_seed(0)
text = torch.tensor(list(Path(__file__).read_bytes()))  # bytes are the tokens
rows = [{"input_ids": ids, "labels": ids} for ids in text.unfold(0, 64, 8)]

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
megalr.factorize_(model, rank=16, targets=["gate_proj", "up_proj", "down_proj"], density=0.03)

matrices, others = megalr.split_parameters(model)  # factors and q, k, v, o; the rest
optimizer = megalr.optim.Fira([{"params": matrices, "rank": 8}, {"params": others}], lr=5e-3)
with TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=60, logging_steps=20, report_to=[])
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[RestartsCallback(every=20, lr_recovery="linear", recovery_updates=5)],
    )
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"update {entry['step']}: loss {entry['loss']:.3f}")
