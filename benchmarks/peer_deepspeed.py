"""Plain DeepSpeed and transformers at the settings of a case, to compare megalr with.

    torchrun --nproc_per_node 2 benchmarks/peer_deepspeed.py --output results

The model is transformers' own of the same sizes, with its attention (sdpa) and its gradient
checkpointing where the case recomputes blocks; the optimizer is torch's fused AdamW, the ZeRO
stage and the micro-batches are the case's, and everything else is DeepSpeed's default. Only dense
models: transformers has no factors. Reported as by benchmarks/throughput.py: the median and the
range of tokens/s over the updates after the third, and the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, Case, stage_of
from record import provenance, save

from megalr.distributed.process_group import start_distributed
from megalr.engine.build import import_deepspeed
from megalr.errors import UserError, exit_cleanly
from megalr.hf.families import transformers_config
from megalr.models.config import decoder_config

SETTLING = 3
"""Updates before those that count, as in throughput.py."""


def model_of(case: Case, changes: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """transformers' model of the case's sizes in bfloat16, with random weights.

    Raises:
        UserError: the case's matrices are not dense.
    """
    import transformers

    if case.method["name"] != "full_rank":
        raise UserError(f"method {case.method['name']}: only full_rank has a model in transformers")
    sizes = decoder_config(case.preset, changes)
    config = transformers_config(sizes, "llama", 4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.config.use_cache = False
    if case.train.get("activation_checkpointing") == "full":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    elif case.train.get("activation_checkpointing", "none") != "none":
        raise UserError("transformers recomputes whole blocks or nothing: take a case that does so")
    return model.train()


def ds_config_of(case: Case, zero: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration: the case's stage and batches, no clipping as in throughput.py."""
    return {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage_of(case), **case.zero, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def update_seconds(engine: Any, case: Case, length: int, updates: int) -> list[float]:
    """Seconds of each update on random tokens ``(micro_batch, length)``."""
    device = engine.device
    vocabulary = engine.module.config.vocab_size
    ids = torch.randint(3, vocabulary, (case.micro_batch, length), device=device)
    seconds = []
    for _ in range(updates):
        started = time.perf_counter()
        for _ in range(case.accumulation):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the case on all ranks of the launcher; the numbers of rank 0."""
    device = start_distributed()
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(verbose=False)
    case = CASES[arguments.case]
    model = model_of(case, arguments.model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ds_config = ds_config_of(case, arguments.zero)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    seconds = update_seconds(engine, case, arguments.sequence_length, arguments.updates)[SETTLING:]
    copies = dist.get_world_size()
    tokens = case.micro_batch * case.accumulation * copies * arguments.sequence_length
    rates = [tokens / second for second in seconds]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    engine.destroy()
    return {
        "case": arguments.case,
        "peer": "DeepSpeed and transformers",
        "gpus": copies,
        "stage": stage_of(case),
        "ds_config": ds_config,
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "update_seconds": round(statistics.median(seconds), 5),
        "peak_memory_gib": round(peak / 2**30, 2),
        **provenance(("torch", "deepspeed", "transformers")),
    }


def main() -> None:
    """Measure and write ``peer_CASE_Ngpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, metavar="CASE", default="7b_full_rank_zero3")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--model", type=json.loads, default={}, help="other sizes, as JSON")
    parser.add_argument("--zero", type=json.loads, default={}, help="keys of zero_optimization")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    if arguments.updates <= SETTLING:
        raise UserError(f"--updates {arguments.updates}: the first {SETTLING} do not count")
    result = measure(arguments)
    if int(os.environ.get("RANK", "0")) == 0:
        save(f"peer_{arguments.case}_{result['gpus']}gpu", result, arguments.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_cleanly(main)
