"""Time and memory of one update of each optimizer at real matrix shapes, on one device.

    python benchmarks/optimizers.py --models llama_350m llama_1b --output benchmarks/results

Weights and gradients are flat fp32 slices that hold the model's tensors, as ZeRO on one rank gives
them to its optimizer; there is no model around them. Reported for each optimizer: the first update
(all projectors are found), the median of later ones, the optimizer's state and the extra peak
during an update. "one by one" gives Muon its matrices one at a time; Spectron has the factors of
the same matrices. Beside them the time to find one projector of each shape by a full SVD, and by
subspace iteration without and with the previous basis, with the share of the best possible energy
that it captures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megalr.errors import exit_cleanly
from megalr.models.config import decoder_config
from megalr.optim import (
    SCALE,
    SPAM,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    GoLore,
    Muon,
    NorMuon,
    Spectron,
    StableSPAM,
)
from megalr.optim.projection import side_of, subspace_basis, svd_bases
from megalr.optim.sharded_optimizer import ShardedOptimizer
from megalr.sharding import exchange
from megalr.sharding.fragment import FlatLayout, Fragment, LogicalTensor

Shape = tuple[int, int]
RANKS = {"llama_9m": 16, "llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512}
GAP = 200
OPTIMIZERS: dict[str, Callable[[Any, int], torch.optim.Optimizer]] = {
    "adamw (torch, fused)": lambda g, r: torch.optim.AdamW(g, fused=True),
    "spam": lambda g, r: SPAM(g),
    "stable_spam": lambda g, r: StableSPAM(g),
    "galore": lambda g, r: GaLore(projected(g, r)),
    "galore, 8-bit states": lambda g, r: GaLore(projected(g, r, state_bits=8)),
    "fira": lambda g, r: Fira(projected(g, r)),
    "apollo": lambda g, r: Apollo(projected(g, r)),
    "apollo_mini": lambda g, r: ApolloMini(projected(g, 1)),
    "golore": lambda g, r: GoLore(projected(g, r), total_updates=10_000),
    "scale": lambda g, r: SCALE(g),
    "muon": lambda g, r: Muon(orthogonal(g)),
    "muon, one by one": lambda g, r: Muon(orthogonal(g)),
    "muon, bf16": lambda g, r: Muon(orthogonal(g), ns_method="standard"),
    "muon, fraction 0.25": lambda g, r: Muon(orthogonal(g), fraction=0.25),
    "normuon": lambda g, r: NorMuon(orthogonal(g)),
    "normuon, fraction 0.25": lambda g, r: NorMuon(orthogonal(g), fraction=0.25),
    "spectron": lambda g, r: Spectron([{**x, "use_spectron": x["name"] == "targets"} for x in g]),
}


def orthogonal(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the mark of matrices that are orthogonalized."""
    return [{**g, "use_muon": g["name"] == "targets"} for g in groups]


def projected(groups: list[dict[str, Any]], rank: int, **options: Any) -> list[dict[str, Any]]:
    """The groups with a projection of the target matrices."""
    options.update(rank=rank, update_proj_gap=GAP)
    return [{**g, **options} if g["name"] == "targets" else g for g in groups]


def target_shapes(model: str) -> list[Shape]:
    """Shapes of the target matrices of all layers, the MLP width padded as the model stores it."""
    sizes = decoder_config(model, {})
    hidden = sizes.hidden_size
    width = -(-sizes.intermediate_size // sizes.pad_multiple) * sizes.pad_multiple
    layer = [(hidden, hidden)] * 4 + [(width, hidden)] * 2 + [(hidden, width)]
    return layer * sizes.num_layers


def gradient(shape: Shape, device: torch.device, seed: int) -> torch.Tensor:
    """A matrix with a slowly decaying spectrum, sigma_k about k^-1/2, and noise."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    inner = min(shape)
    decay = torch.arange(1, inner + 1, device=device).rsqrt()
    grad = (normal(shape[0], inner) * decay) @ normal(inner, shape[1]) / inner
    return 1e-3 * (grad + 0.01 * normal(*shape))


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock sees the work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, device work included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a nested state."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []


def on_meta(name: str, shape: Shape) -> torch.nn.Parameter:
    """A parameter without values that is one logical tensor."""
    parameter = torch.nn.Parameter(torch.empty(shape, device="meta"))
    parameter.row_blocks = ((name, 0, shape[0]),)  # type: ignore[attr-defined]
    return parameter


def sliced(name: str, model: str, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over two flat slices with gradients, as ZeRO on one rank gives them to it."""
    sizes = decoder_config(model, {})
    targets = [(f"w{i}", shape) for i, shape in enumerate(target_shapes(model))]
    if name == "spectron":
        r = RANKS[model]
        pairs = [((f"{w}.B", (m, r)), (f"{w}.A", (r, n))) for w, (m, n) in targets]
        targets = [factor for pair in pairs for factor in pair]
    others = [(f"other{i}", (sizes.vocab_size, sizes.hidden_size)) for i in range(2)]
    groups = [
        {"name": label, "params": [on_meta(*named) for named in part]}
        for label, part in (("targets", targets), ("others", others))
    ]
    made = OPTIMIZERS[name](groups, RANKS[model])
    layouts: dict[torch.Tensor, FlatLayout] = {}
    number = 0
    for group, part in zip(made.param_groups, (targets, others), strict=True):
        numel = sum(math.prod(shape) for _, shape in part)
        flat = torch.nn.Parameter(0.02 * torch.randn(numel, device=device))
        flat.grad, tensors, offset = torch.empty_like(flat), [], 0
        for tensor, shape in part:
            number += 1
            fragment = Fragment(0, 0, offset, math.prod(shape))
            tensors.append(LogicalTensor(tensor, shape, (fragment,), 0, number))
            fragment.of(flat.grad).copy_(gradient(shape, device, number).flatten())
            offset += fragment.numel
        group["params"] = [flat]
        layouts[flat] = FlatLayout(tuple(tensors))
    if isinstance(made, ShardedOptimizer):
        made.attach_layouts(layouts)
    return made


def measure(name: str, model: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Numbers of one optimizer on the tensors of one model."""
    chunk = 1 if name.endswith("one by one") else exchange.BUCKET_ELEMENTS
    with mock.patch.object(exchange.buckets, "__defaults__", (chunk,)):
        return _measure(name, model, repeats, device)


def _measure(name: str, model: str, repeats: int, device: torch.device) -> dict[str, Any]:
    optimizer = sliced(name, model, device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    first = timed(optimizer.step, device)
    times = [timed(optimizer.step, device) for _ in range(repeats)]
    tensors = [tensor for state in optimizer.state.values() for tensor in tensors_in(state)]
    state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    peak = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        optimizer.step()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated() - held
        state = max(state, held - before)
    return {
        "model": model,
        "optimizer": name,
        "first_update_seconds": round(first, 4),
        "update_milliseconds": round(1e3 * statistics.median(times), 2),
        "update_milliseconds_range": [round(1e3 * t, 2) for t in (min(times), max(times))],
        "state_gib": round(state / 2**30, 3),
        "extra_peak_gib": round(peak / 2**30, 3),
    }


def refreshes(model: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds to find one projector of every shape, and their sum over the model."""
    rank, rows = RANKS[model], []
    totals = {"svd": 0.0, "cold": 0.0, "warm": 0.0}
    for shape, count in Counter(target_shapes(model)).items():
        side = side_of(shape, "std")
        grad, later = gradient(shape, device, 0), gradient(shape, device, 0)
        later += 0.3 * gradient(shape, device, 1)
        basis = subspace_basis(grad, rank, side, None, 0)

        def svd(g: torch.Tensor = later) -> None:
            svd_bases(g, rank)

        def cold(g: torch.Tensor = later, s: str = side) -> None:
            subspace_basis(g, rank, s, None, 0)

        def warm(g: torch.Tensor = later, s: str = side, b: torch.Tensor = basis) -> None:
            subspace_basis(g, rank, s, b, 0)

        row: dict[str, Any] = {"shape": shape, "rank": rank, "matrices": count}
        for label, work, times in (
            ("svd", svd, 1),
            ("cold", cold, repeats),
            ("warm", warm, repeats),
        ):
            work()
            spent = statistics.median(timed(work, device) for _ in range(times))
            row[f"{label}_milliseconds"] = round(1e3 * spent, 2)
            totals[label] += count * spent
        best = torch.linalg.svdvals(later.double())[:rank].square().sum()
        for label, origin in (("cold", None), ("warm", basis)):
            found = subspace_basis(later, rank, side, origin, 0).double()
            image = later.double() @ found if side == "right" else found.mT @ later.double()
            row[f"{label}_energy"] = round(float(image.square().sum() / best), 5)
        rows.append(row)
    seconds = {label: round(value, 3) for label, value in totals.items()}
    return {"model": model, "shapes": rows, "all_matrices_seconds": seconds}


def main() -> None:
    """Measure everything asked for and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=RANKS, default=["llama_350m", "llama_1b"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="unknown", help="commit to note in the result")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    result: dict[str, Any] = {
        "commit": arguments.commit,
        "device": gpu,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "refresh": [],
        "updates": [],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        result["refresh"].append(refreshes(model, arguments.repeats, device))
        print(json.dumps(result["refresh"][-1]), flush=True)
        for name in arguments.optimizers:
            row = measure(name, model, arguments.repeats, device)
            result["updates"].append(row)
            print(json.dumps(row), flush=True)
        (arguments.output / "optimizers.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    exit_cleanly(main)
