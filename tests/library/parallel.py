"""Training of one small model on one process, under DDP and under FSDP2, for worker processes."""

from __future__ import annotations

import io
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import megalr
from tests.library.models import batch, loss_of, net

TARGETS = ["up", "down"]
RANK = {"rank": 2, "update_proj_gap": 3}
RESTARTS = {"every": 3, "lr_recovery": "linear", "recovery_updates": 2}
TRANSPORT = {"every": 3, "reset": "transport"}
IMBALANCE = {"imbalance_threshold": 0.2, "imbalance_every": 2, "lr_recovery": "linear"}
UPDATES = 7


def _split(make, **options):
    """An optimizer with options for matrices; the head, which is not a target, has none."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        matrices, others = megalr.split_parameters(model, targets=TARGETS)
        return make([{"params": matrices, **options}, {"params": others}])

    return build


def by_kind(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of SCALE."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    embedding, head = inner.embedding.weight, inner.head.weight
    return [
        {"params": [embedding], "kind": "embedding"},
        {"params": [head], "kind": "head"},
        {"params": [p for p in inner.parameters() if p is not embedding and p is not head]},
    ]


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "adamw, transport": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "adamw, imbalance": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-1, momentum=0.9),
    "spam": lambda m: megalr.optim.SPAM(
        m.parameters(), lr=1e-2, update_gap=4, warmup_epoch=2, grad_accu_steps=1, threshold=5.0
    ),
    "spam with a mask": _split(
        lambda g: megalr.optim.SPAM(g, lr=1e-2, update_gap=4, warmup_epoch=2), density=0.5
    ),
    "stable_spam": lambda m: megalr.optim.StableSPAM(m.parameters(), lr=1e-2, total_T=20),
    "galore": _split(lambda g: megalr.optim.GaLore(g, lr=1e-2), **RANK),
    "fira": _split(lambda g: megalr.optim.Fira(g, lr=1e-2), **RANK),
    "apollo": _split(lambda g: megalr.optim.Apollo(g, lr=1e-2), **RANK),
    "apollo_mini": _split(lambda g: megalr.optim.ApolloMini(g, lr=1e-3), **{**RANK, "rank": 1}),
    "golore": _split(
        lambda g: megalr.optim.GoLore(g, lr=1e-2, total_updates=7, rand_ratio=0.5), **RANK
    ),
    "muon": _split(lambda g: megalr.optim.Muon(g, lr=1e-2, ns_method="gram"), use_muon=True),
    "muon, transport": _split(
        lambda g: megalr.optim.Muon(g, lr=1e-2, ns_method="gram"), use_muon=True
    ),
    "dion2": _split(lambda g: megalr.optim.Muon(g, lr=1e-2, fraction=0.4), use_muon=True),
    "normuon": _split(lambda g: megalr.optim.NorMuon(g, lr=1e-2), use_muon=True),
    "normuon, transport": _split(lambda g: megalr.optim.NorMuon(g, lr=1e-2), use_muon=True),
    "scale": lambda m: megalr.optim.SCALE(by_kind(m), lr=1e-2),
    "spectron": _split(lambda g: megalr.optim.Spectron(g, lr=1e-1), use_spectron=True),
    "spectron, transport": _split(
        lambda g: megalr.optim.Spectron(g, lr=1e-1), use_spectron=True
    ),
    "loro": lambda m: megalr.optim.LORO(
        [*chain(*megalr.split_parameters(m))], lr=1e-2, hidden_size=12, exact_every=3
    ),
}  # fmt: skip


def factorized(density: float | None = None) -> nn.Module:
    return megalr.factorize_(
        net(), rank=3, targets=TARGETS, density=density, alpha=8.0, init="kaiming"
    )


def shard(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights on every rank. Collective."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def train(model: nn.Module, parts: tuple, first: int, last: int, alone: bool = False) -> None:
    """Updates on this rank's share of the global batches (all of them if ``alone``)."""
    rank, size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    optimizer, restarts = parts
    for index in range(first, last):
        optimizer.zero_grad()
        loss_of(model, batch(index).chunk(size)[rank]).backward()
        optimizer.step()
        restarts.step()


def parts_of(model: nn.Module, kind: str) -> tuple:
    optimizer = OPTIMIZERS[kind](model)
    settings = {"transport": TRANSPORT, "imbalance": IMBALANCE}.get(kind.split(", ")[-1], RESTARTS)
    return optimizer, megalr.Restarts(model, optimizer, **settings)


def alone(kind: str, density: float | None = None) -> dict[str, torch.Tensor]:
    """The weights that one process reaches."""
    model = factorized(density)
    train(model, parts_of(model, kind), 0, UPDATES, alone=True)
    return whole(model)


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(two)
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def wrapped(mode: str, density: float | None = None) -> nn.Module:
    model = factorized(density)
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode == "hybrid":
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("r", "s"))
        return shard(model, mesh)
    return shard(model)


def distances(mode: str, kinds: list[str], density: float | None = None) -> dict[str, float]:
    """Largest distance of weights from those of one process, for each optimizer."""
    found = {}
    for kind in kinds:
        model = wrapped(mode, density)
        parts = parts_of(model, kind)
        train(model, parts, 0, UPDATES)
        found[kind] = distance(whole(model), alone(kind, density))
        assert (parts[1].state_dict()["triggered_reset"] is None) != kind.endswith("imbalance")
        assert distance(whole(model), whole(factorized(density))) > 1e-3
    return found


def resumed(kinds: list[str]) -> dict[str, bool]:
    """Whether each rank's own files continue a run under FSDP2 bit for bit."""
    found = {}
    for kind in kinds:
        model = wrapped("fsdp2")
        parts = parts_of(model, kind)
        train(model, parts, 0, 4)
        file = io.BytesIO()
        torch.save([x.state_dict() for x in (model, *parts)], file)
        train(model, parts, 4, UPDATES)
        again = wrapped("fsdp2")
        new = parts_of(again, kind)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        for part, state in zip((again, *new), saved, strict=True):
            part.load_state_dict(state)
        train(again, new, 4, UPDATES)
        found[kind] = distance(whole(model), whole(again)) == 0
    return found


def _together(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(model, optimizer)
    return {"weights": weights, "states": states}


def save_together(kind: str, folder: str) -> None:
    model = wrapped("fsdp2")
    parts = parts_of(model, kind)
    train(model, parts, 0, 4)
    torch.distributed.checkpoint.save(_together(model, parts[0]), checkpoint_id=folder)


def continue_from(kinds: list[str], folder: str) -> dict[str, float]:
    """Distances from one process that trained without a break."""
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = {}
    for kind in kinds:
        model = wrapped("fsdp2")
        optimizer, restarts = parts_of(model, kind)
        state = _together(model, optimizer)
        torch.distributed.checkpoint.load(state, checkpoint_id=f"{folder}/{kind}")
        set_state_dict(
            model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["states"]
        )
        restarts.load_state_dict({"updates": 4})
        train(model, (optimizer, restarts), 4, UPDATES)
        found[kind] = distance(whole(model), alone(kind))
    return found


def load_of_rank_0(kind: str) -> str | None:
    """The error of loading rank 0's state of the optimizer here."""
    model = wrapped("fsdp2")
    parts = parts_of(model, kind)
    train(model, parts, 0, 1)
    file = io.BytesIO()
    torch.save(parts[0].state_dict(), file)
    content = [file.getvalue()]
    dist.broadcast_object_list(content)
    return message_of(
        lambda: parts[0].load_state_dict(torch.load(io.BytesIO(content[0]), weights_only=True))
    )


def message_of(action) -> str | None:
    try:
        action()
    except megalr.UserError as error:
        return str(error)
    return None


REFUSED = (
    "sharded already: call factorize_ before fully_shard",
    "sharded over ranks: load a full state dict",
    "split by rows over one dimension of the mesh",
    "not in the model: it was built before factorize_ or fully_shard",
    "wrapped by DDP already",
)


def refusals() -> list[str | None]:
    """The errors of calls in the wrong order and of other placements."""
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = fully_shard(net(), mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    late = factorized()
    optimizer = torch.optim.AdamW(late.parameters())
    shard(late)
    return [
        message_of(lambda: megalr.factorize_(shard(net()), rank=3)),
        message_of(lambda: megalr.merge_(shard(factorized()))),
        message_of(lambda: megalr.optim.SPAM(columns.parameters(), lr=1e-2)),
        message_of(lambda: megalr.Restarts(late, optimizer, every=2)),
        message_of(lambda: megalr.factorize_(DistributedDataParallel(net()), rank=3)),
    ]


def busy_ranks(kind: str) -> list[int]:
    """How many whole matrices this rank owns."""
    model = wrapped("fsdp2")
    optimizer, restarts = parts_of(model, kind)
    train(model, (optimizer, restarts), 0, 1)
    return sum(len(state.get("matrices", {})) for state in optimizer.state.values())
