"""Low-rank pretraining with restarts in a plain loop: python examples/plain_loop.py"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import megalr

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes)).to(device)
megalr.factorize_(model, rank=16, init="kaiming")  # before the optimizer is built

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=60)
restarts = megalr.Restarts(model, optimizer, every=20, lr_recovery="linear", recovery_updates=5)
text = torch.tensor(list(Path(__file__).read_bytes()), device=device)

for update in range(60):
    starts = torch.randint(len(text) - 64, (8,)).tolist()
    ids = torch.stack([text[start : start + 64] for start in starts])  # (8, 64) bytes
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if restarts.step():
        print(f"update {restarts.updates}: restart")
    scheduler.step()
    if update % 20 in (0, 19):
        print(f"update {update + 1}: loss {loss.item():.3f}")

megalr.merge_(model)  # plain linears again: model.save_pretrained(...)
