"""litgpt's training of a dense model at several lengths, to compare megalr with.

    python benchmarks/peer_litgpt.py --sequence 2048 4096 8192 --output results

What its ``litgpt.pretrain`` does in an update, by its own parts: the model ``litgpt.model.GPT``
under torch.compile and Lightning Fabric's bf16-mixed (float32 weights, autocast), its chunked cross
entropy, torch's fused AdamW, no clipping. Sizes are those of LLaMA 1B as megalr pads them; an
update is one micro-batch of 16,384 random tokens, or one sequence. Reported as by
benchmarks/throughput.py: the median and the range of tokens/s over the updates after the third, and
what the allocator had allocated and reserved at most. ``pip install --no-deps litgpt==0.5.13`` and
lightning are needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import provenance, save

from megalr.errors import UserError, exit_cleanly

TOKENS = 16_384
SETTLING = 3
"""Updates before those that count, as in throughput.py."""

SIZES: dict[str, Any] = {
    "n_embd": 2048,
    "intermediate_size": 5504,
    "n_layer": 24,
    "n_head": 32,
    "vocab_size": 32_000,
    "padded_vocab_size": 32_000,
}
LLAMA: dict[str, Any] = {
    "bias": False,
    "parallel_residual": False,
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-6,
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
}


def litgpt_parts() -> tuple[Any, Any, Any]:
    """litgpt's Config, GPT and chunked cross entropy.

    Raises:
        UserError: one of the packages is missing.
    """
    try:
        from litgpt.model import GPT  # isort: skip  (litgpt wants it before its Config)
        from litgpt.config import Config
        from litgpt.utils import chunked_cross_entropy
    except ImportError as error:
        raise UserError(f"{error}: pip install --no-deps litgpt==0.5.13 lightning") from None
    return Config, GPT, chunked_cross_entropy


def update_seconds(length: int, arguments: argparse.Namespace, fabric: Any) -> list[float]:
    """Seconds of each update with sequences of a length."""
    Config, GPT, chunked_cross_entropy = litgpt_parts()
    config = Config(name="peer", block_size=length, **LLAMA, **{**SIZES, **arguments.model})
    with fabric.init_module():
        model = GPT(config)
    model.apply(model._init_weights)
    model = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fabric.device.type == "cuda")
    optimizer = fabric.setup_optimizers(optimizer)
    rows = max(1, arguments.tokens // length)
    ids = torch.randint(3, config.vocab_size, (rows, length + 1), device=fabric.device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    seconds = []
    for _ in range(arguments.updates):
        started = time.perf_counter()
        loss = chunked_cross_entropy(model(inputs), targets, chunk_size=arguments.loss_chunk)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(length: int, arguments: argparse.Namespace, fabric: Any) -> dict[str, Any]:
    """One length."""
    torch.compiler.reset()
    cuda = fabric.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = update_seconds(length, arguments, fabric)
    rows = max(1, arguments.tokens // length)
    rates = [rows * length / second for second in seconds[SETTLING:]]
    reserved = torch.cuda.max_memory_reserved() if cuda else 0
    allocated = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "sequence": length,
        "micro_batch": rows,
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "update_seconds": round(statistics.median(seconds[SETTLING:]), 5),
        "peak_memory_gib": round(allocated / 2**30, 2),
        "reserved_gib": round(reserved / 2**30, 2),
        "first_update_seconds": round(seconds[0], 2),
    }


def main() -> None:
    """Measure each length and write ``peer_litgpt.json`` after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a micro-batch")
    parser.add_argument(
        "--loss_chunk", type=int, default=128, help="tokens; 0: all logits at once (litgpt: 128)"
    )
    parser.add_argument("--model", type=json.loads, default={}, help="other sizes, as JSON")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    if arguments.updates <= SETTLING:
        raise UserError(f"--updates {arguments.updates}: the first {SETTLING} do not count")
    litgpt_parts()
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment

    # Named, so that no other launcher is looked for: mpi4py without MPI is an error there.
    fabric = Fabric(devices=1, precision="bf16-mixed", plugins=[LightningEnvironment()])
    fabric.launch()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    record = {
        "peer": "litgpt, torch.compile, bf16-mixed",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **provenance(("torch", "lightning", "litgpt")),
        "sizes": {**SIZES, **arguments.model},
        "loss_chunk": arguments.loss_chunk,
        "rows": rows,
    }
    for length in arguments.sequence:
        rows.append(measure(length, arguments, fabric))
        save("peer_litgpt", record, arguments.output)


if __name__ == "__main__":
    exit_cleanly(main)
