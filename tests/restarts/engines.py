"""A tiny factorized decoder inside DeepSpeed engines of every kind, for the tests of restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from megalr.config.schema import RunConfig
from megalr.engine.config import resolve_deepspeed_config
from megalr.engine.unwrapped_step import without_accumulation_dtype
from megalr.models.build import build_decoder
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Decoder
from megalr.optim.groups import parameter_groups
from megalr.restarts.refactorize import factor_parameters

GLOBAL_BATCH = 6  # sequences; divides by 1, 2 and 3 ranks
LENGTH = 8
VOCABULARY = 37

_CPU = {"device": "cpu", "pin_memory": False}
# name -> (precision, zero_optimization of the user's JSON)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32 stage 0": ("fp32", {"stage": 0}),
    "fp32 stage 1": ("fp32", {"stage": 1}),
    "fp32 stage 2": ("fp32", {"stage": 2}),
    "fp32 stage 3": ("fp32", {"stage": 3, "stage3_param_persistence_threshold": 0}),
    "fp32 stage 3 persistent": ("fp32", {"stage": 3}),
    "fp32 stage 2 offload": ("fp32", {"stage": 2, "offload_optimizer": _CPU}),
    "fp32 stage 3 offload": (
        "fp32",
        {
            "stage": 3,
            "offload_optimizer": _CPU,
            "offload_param": _CPU,
            "stage3_param_persistence_threshold": 120,
        },
    ),
    "bf16 stage 0": ("bf16", {"stage": 0}),
    "bf16 stage 1": ("bf16", {"stage": 1}),
    "bf16 stage 2": ("bf16", {"stage": 2}),
    "bf16 stage 2 offload": ("bf16", {"stage": 2, "offload_optimizer": _CPU}),
    "bf16 stage 3": ("bf16", {"stage": 3, "stage3_param_persistence_threshold": 120}),
    "bf16 stage 3 offload": (
        "bf16",
        {"stage": 3, "offload_optimizer": _CPU, "stage3_param_persistence_threshold": 0},
    ),
    "paper_bf16 stage 0": ("paper_bf16", {"stage": 0}),
    "paper_bf16 stage 1": ("paper_bf16", {"stage": 1}),
    "paper_bf16 stage 3": (
        "paper_bf16",
        {"stage": 3, "stage3_param_persistence_threshold": 0},
    ),
}


def on_ranks(kinds: Iterable[str], few: Iterable[str]) -> list[tuple[int, str]]:
    """(ranks, kind) of all ``kinds`` on three ranks, which cut factors inside rows, and of the
    ``few`` on one and two."""
    return [(ranks, kind) for ranks in (1, 2) for kind in few] + [(3, kind) for kind in kinds]


def make_decoder(method: str = "low_rank") -> Decoder:
    """Two blocks whose factor parameters have sizes that 2 and 3 ranks cut inside rows."""
    sizes = DecoderConfig(
        hidden_size=20,
        intermediate_size=27,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        vocab_size=VOCABULARY,
        pad_multiple=4,
    )
    config = _run_config("fp32", method)
    return build_decoder(sizes, config.method, seed=3)


def _run_config(precision: str, method: str = "low_rank", micro: int = 1) -> RunConfig:
    settings: dict[str, Any] = {"name": method}
    if method == "low_rank":
        settings |= {"rank": 5, "alpha": 5.0}
    if method == "dlr":
        settings = {"name": "low_rank", "rank": 5, "alpha": 5.0, "init": "normal", "dlr_alpha": 0.7}
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"preset": "llama_9m"},
            "method": settings,
            "optimizer": {"lr": 1e-3},
            "data": {"train": "unused"},
            "train": {
                "updates": 100,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": micro,
                "precision": precision,
            },
        }
    )


def make_optimizer(decoder: Decoder, lr: float = 2e-3, weight_decay: float = 0.01) -> Any:
    groups = parameter_groups(decoder, factor_parameters(decoder.factor_pairs()), weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), eps=1e-6)


@contextmanager
def engine_of(
    kind: str, method: str = "low_rank", optimizer: Any = None, **zero_options: Any
) -> Iterator[Any]:
    """An engine of a kind of ``KINDS`` around the tiny decoder, destroyed at the end.

    ``zero_options`` go past the checks of the DeepSpeed JSON.
    """
    precision, zero = KINDS[kind]
    world = dist.get_world_size()
    config = _run_config(precision, method, micro=GLOBAL_BATCH // world)
    zero = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000, **zero}
    resolved = resolve_deepspeed_config(config, {"zero_optimization": zero}, "test", world)
    resolved["zero_optimization"] |= zero_options
    decoder = make_decoder(method)
    if kind == "paper_bf16 stage 0":  # as build_engine does; DeepSpeed casts for the others
        decoder.bfloat16()
        resolved = without_accumulation_dtype(resolved)
    engine, *_ = deepspeed.initialize(
        model=decoder,
        optimizer=make_optimizer(decoder) if optimizer is None else optimizer(decoder),
        config=resolved,
        dist_init_required=False,
    )
    try:
        yield engine
    finally:
        engine.destroy()


def batch(update: int) -> tuple[Tensor, Tensor]:
    """The global batch of an update: ids and labels (6, 8), the same on all ranks."""
    generator = torch.Generator().manual_seed(1000 + update)
    ids = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def train(engine: Any, update: int) -> float:
    """One update on ``batch(update)``; the mean loss per target over the global batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ids, labels = (x.chunk(world)[rank] for x in batch(update))
    loss = engine(ids, labels)
    engine.backward(loss * (world / labels.numel() / world))
    engine.step()
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total) / (GLOBAL_BATCH * LENGTH)


def logits(engine: Any, update: int = 0) -> Tensor:
    """Logits of the whole global batch on this rank."""
    with torch.no_grad():
        return engine(batch(update)[0]).float().clone()


def message_of(function: Callable[..., Any], *args: Any) -> str:
    """``Type: message`` of what ``function(*args)`` raises, "" if nothing.

    Raising out of a worker would end all workers, which are dear to start.
    """
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
