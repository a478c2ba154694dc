"""Low-rank pretraining under FSDP2: torchrun --nproc-per-node 2 examples/fsdp2.py"""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import megalr

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
if device == "cuda":
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
torch.manual_seed(0)  # the same weights on every rank
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes)).to(device)
megalr.factorize_(model, rank=16, init="kaiming")  # first factorize, then shard, then optimize
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = megalr.optim.StableSPAM(model.parameters(), lr=3e-3, total_T=60)
restarts = megalr.Restarts(model, optimizer, every=20, lr_recovery="linear", recovery_updates=5)
text = torch.tensor(list(Path(__file__).read_bytes()), device=device)
torch.manual_seed(1 + dist.get_rank())  # other batches on every rank

for update in range(60):
    starts = torch.randint(len(text) - 64, (8,)).tolist()
    ids = torch.stack([text[start : start + 64] for start in starts])  # (8, 64) bytes
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    restarts.step()  # all ranks together
    if update % 20 in (0, 19) and dist.get_rank() == 0:
        print(f"update {update + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()
time.sleep(0.1)  # FSDP2 holds the group: gloo's threads must rest before Python ends
