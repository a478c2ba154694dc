"""Causal attention with RoPE: our kernels against scaled_dot_product_attention, on one GPU.

    python benchmarks/attention.py --output results

For the attention of 60M to 7B models in bfloat16: the error of o, dq, dk, dv against plain math in
float32, and milliseconds of forward and backward, for torch's attention with rotations compiled by
torch.compile and for our kernels in each configuration. Every timed piece of work is one CUDA
graph, as in training, and finds an empty L2 cache. Configurations are compiled by several
processes; one that does not compile or run is listed with the reason.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from record import provenance, save
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalr.kernels.attention import (
    Backward,
    Forward,
    attention,
    backward_choice,
    forward_choice,
    launch_backward,
    launch_forward,
    plain_attention,
)
from megalr.models.decoder import rope_tables

Choice = Forward | Backward

# B, S, H, D
SHAPES = {
    "1b": (64, 256, 32, 64),
    "7b": (16, 256, 32, 128),
    "60m": (128, 256, 8, 64),
    "350m": (64, 256, 16, 64),
}
LIKE = {"60m": "1b", "350m": "1b"}
"""Shapes that try only the best configurations of another one of the same head width."""
BEST = 4

FORWARD = (
    Forward(64, 64, 4, 1),
    Forward(64, 64, 4, 1, 128),
    Forward(64, 64, 4, 2),
    Forward(128, 64, 4, 1),
    Forward(128, 64, 4, 2),
    Forward(128, 64, 8, 1),
    Forward(128, 64, 8, 1, 128),
    Forward(128, 64, 8, 2),
    Forward(128, 128, 8, 1),
    Forward(128, 128, 8, 2),
)
BACKWARD = (
    Backward(64, 128, 8, 1, 1),
    Backward(64, 128, 8, 1, 2, 128),
    Backward(64, 128, 8, 2, 1),
    Backward(64, 128, 16, 1, 1),
    Backward(32, 128, 8, 1, 1),
    Backward(32, 128, 8, 2, 1),
    Backward(32, 128, 8, 1, 2, 128),
    Backward(128, 128, 8, 1, 1),
    Backward(64, 64, 4, 1, 2),
    Backward(64, 64, 4, 2, 2),
    Backward(64, 64, 4, 1, 3, 168),
    Backward(32, 64, 4, 1, 2),
    Backward(32, 64, 4, 1, 3, 168),
    Backward(32, 64, 4, 2, 3, 168),
    Backward(32, 64, 4, 1, 4, 128),
)


def inputs_of(shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """q, k, v, do ``(B, S, H * D)`` bfloat16 and the tables of rope."""
    B, S, H, D = shape
    torch.manual_seed(0)
    big = [torch.randn(B, S, H * D, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    return [*big, rope_tables(S, D, 10000.0, big[0].device)]


def work_of(shape: tuple[int, int, int, int], choice: Choice) -> Callable[[], Any]:
    """A launch of the kernel that the choice is for."""
    q, k, v, do, rope = inputs_of(shape)
    D = shape[3]
    if isinstance(choice, Forward):
        return lambda: launch_forward(q, k, v, rope, D, choice)
    o, lse = launch_forward(q, k, v, rope, D, Forward(64, 64, 4, 1))
    return lambda: launch_backward(do, q, k, v, rope, o, lse, D, choice)


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:120]


def compile_choice(shape: tuple[int, int, int, int], choice: Choice) -> None:
    """Leave the kernel in Triton's cache on disk; for a worker process."""
    work_of(shape, choice)()
    torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any]) -> float:
    """Median time of a CUDA graph of the work."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return do_bench(graph.replay, warmup=10, rep=40, return_mode="median")


def plain_work(shape: tuple[int, int, int, int]) -> dict[str, Callable[[], Any]]:
    """Compiled sdpa with rotations: the forward pass of training, and forward with backward."""
    q, k, v, do, rope = inputs_of(shape)
    D = shape[3]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(lambda q, k, v: plain_attention(q, k, v, rope, None, D), dynamic=False)
    return {
        "forward": lambda: compiled(*inputs),
        "both": lambda: torch.autograd.grad(compiled(*inputs), inputs, do),
    }


def errors(shape: tuple[int, int, int, int]) -> dict[str, dict[str, float]]:
    """Norm of the error over the norm, by implementation and result; at most 8 sequences."""
    _, S, H, D = shape
    q, k, v, do, rope = inputs_of((8, S, H, D))

    def results(f: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        o = f(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, do.to(dtype))]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain_attention(q, k, v, rope, None, D)

    with sdpa_kernel(SDPBackend.MATH):
        exact = results(plain, torch.float32)
    found = {
        "sdpa": results(plain, torch.bfloat16),
        "kernels": results(lambda q, k, v: attention(q, k, v, rope, D), torch.bfloat16),
    }
    return {
        name: {
            part: float(f"{(x.float() - e).norm() / e.norm():.2e}")
            for part, x, e in zip(("o", "dq", "dk", "dv"), parts, exact, strict=True)
        }
        for name, parts in found.items()
    }


def measured(work: Callable[[], Callable[[], Any]]) -> float | str:
    """Milliseconds of the work that is made, or why there are none."""
    try:
        return round(milliseconds(work()), 4)
    except Exception as error:  # one bad configuration must not end the others
        torch.cuda.synchronize()
        return reason(error)


def ranked(times: dict[Any, float | str]) -> list[Any]:
    """Keys that have a time, the fastest first."""
    return sorted((c for c, t in times.items() if isinstance(t, float)), key=lambda c: times[c])


def measure_shape(name: str, choices: list[Choice], pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Errors and times of one shape; prints its table."""
    shape = SHAPES[name]
    futures: dict[Choice, Future[None]] = {
        choice: pool.submit(compile_choice, shape, choice) for choice in choices
    }
    plain = plain_work(shape)
    for work in plain.values():
        work()  # compiles while the other processes compile the kernels
    times: dict[Choice, float | str] = {}
    failed = {choice: future.exception() for choice, future in futures.items()}
    result: dict[str, Any] = {"shape_B_S_H_D": shape}
    try:
        result["errors"] = errors(shape)
    except Exception as error:
        result["errors"] = reason(error)
    forward, both = (measured(lambda work=work: work) for work in plain.values())
    backward = (
        round(both - forward, 4)
        if isinstance(forward, float) and isinstance(both, float)
        else f"{forward} {both}"
    )
    result["sdpa_ms"] = {"forward": forward, "backward": backward}
    for choice in choices:
        problem = failed[choice]
        times[choice] = reason(problem) if problem else measured(lambda c=choice: work_of(shape, c))
    print(f"{name} {shape} errors {result['errors']}")
    for kind, label in ((Forward, "forward"), (Backward, "backward")):
        mine: dict[Any, float | str] = {c: t for c, t in times.items() if isinstance(c, kind)}
        default = (forward_choice if kind is Forward else backward_choice)(shape[3], shape[1])
        order = ranked(mine)
        print(f"  {label}: sdpa {result['sdpa_ms'][label]} ms; default {astuple(default)}")
        for choice in [*order, *(c for c in mine if c not in order)]:
            print(f"    {astuple(choice)!s:32} {mine[choice]}", flush=True)
        result[label] = {str(astuple(c)): mine[c] for c in [*order, *(set(mine) - set(order))]}
        result[f"best_{label}"] = order[:BEST]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of attention.json")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name in sorted(arguments.shapes, key=list(SHAPES).index):
            like = results.get(LIKE.get(name, ""))
            choices: list[Choice] = [*FORWARD, *BACKWARD]
            if like:
                choices = [*like["best_forward"], *like["best_backward"]]
            results[name] = measure_shape(name, choices, pool)
    for result in results.values():
        for label in ("forward", "backward"):
            result[f"best_{label}"] = [str(astuple(c)) for c in result[f"best_{label}"][:1]]
    device = torch.cuda.get_device_name()
    record = {**provenance(("torch",)), "device": device, "shapes": results}
    save("attention", record, arguments.output)


if __name__ == "__main__":
    main()
