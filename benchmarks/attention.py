"""Causal attention with RoPE: our kernels against scaled_dot_product_attention, on one GPU.

    python benchmarks/attention.py --output results

For the attention of 60M to 1B models in bfloat16: the error of o, dq, dk, dv against plain math in
float32, and milliseconds of forward and backward, for torch's attention with rotations compiled by
torch.compile and for our kernels in each configuration. Every timed piece of work is one CUDA
graph, as in training, and finds an empty L2 cache. Configurations are compiled by several
processes before anything is measured; one that does not compile or run is listed with the reason.
The results are saved after each shape.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from record import provenance
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalr.files import write_atomic
from megalr.kernels.attention import attention_reference
from megalr.kernels.attention_backward_triton import (
    BackwardConfig,
    backward_config,
    launch_backward,
)
from megalr.kernels.attention_triton import ForwardConfig, forward_config, launch_forward
from megalr.models.rope import rope_tables

Choice = ForwardConfig | BackwardConfig

# B, S, H, D
SHAPES = {
    "1b": (64, 256, 32, 64),
    "60m": (128, 256, 8, 64),
    "350m": (64, 256, 16, 64),
}
SHORT = ("60m", "350m")
"""Shapes that try only the first two choices of a kind: they differ from 1b in B and H alone."""
PARTS = ("o", "dq", "dk", "dv")
# By head width, the most promising first. Few, so that all shapes take about a minute.
CHOICES: dict[int, tuple[Choice, ...]] = {
    64: (
        ForwardConfig(64, 64, 4, 1, 128),
        ForwardConfig(64, 32, 4, 1, 96),
        ForwardConfig(64, 64, 4, 1),
        ForwardConfig(64, 32, 4, 1, 128),
        ForwardConfig(128, 64, 4, 1),
        BackwardConfig(64, 64, 4, 1, 3, 168),
        BackwardConfig(64, 64, 4, 1, 2),
        BackwardConfig(32, 64, 4, 1, 4, 128),
        BackwardConfig(64, 64, 4, 2, 2),
        BackwardConfig(128, 128, 8, 1, 1),
    ),
}


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
    if isinstance(choice, ForwardConfig):
        return lambda: launch_forward(q, k, v, rope, D, choice)
    B, S, H, _ = shape
    lse = torch.full((B, H, S), 8.0, device="cuda")  # any numbers take the same time
    return lambda: launch_backward(do, q, k, v, rope, do, lse, D, choice)


def label_of(choice: Choice) -> str:
    """The kind and the numbers of a choice."""
    return f"{type(choice).__name__.removesuffix('Config').lower()} {astuple(choice)}"


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
    compiled = torch.compile(
        lambda q, k, v: attention_reference(q, k, v, rope, None, D), dynamic=False
    )
    return {
        "forward": lambda: compiled(*inputs),
        "both": lambda: torch.autograd.grad(compiled(*inputs), inputs, do),
    }


def errors(shape: tuple[int, int, int, int], choices: list[Choice]) -> dict[str, dict[str, float]]:
    """Norm of the error over the norm by result, for 8 sequences: of sdpa and of the choices."""
    _, S, H, D = shape
    q, k, v, do, rope = inputs_of((8, S, H, D))

    def results(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        o = attention_reference(*inputs, rope, None, D)
        gradients = torch.autograd.grad(o, inputs, do.to(dtype))
        return dict(zip(PARTS, (o.detach(), *gradients), strict=True))

    with sdpa_kernel(SDPBackend.MATH):
        exact = results(torch.float32)
    found = {"sdpa": results(torch.bfloat16)}
    o, lse = launch_forward(q, k, v, rope, D)
    for choice in choices:
        try:
            if isinstance(choice, ForwardConfig):
                parts = {"o": launch_forward(q, k, v, rope, D, choice)[0]}
            else:
                gradients = launch_backward(do, q, k, v, rope, o, lse, D, choice)
                parts = dict(zip(PARTS[1:], gradients, strict=True))
        except Exception:  # its time will say why
            continue
        found[label_of(choice)] = parts
    return {
        name: {
            part: float(f"{(x.float() - exact[part]).norm() / exact[part].norm():.2e}")
            for part, x in parts.items()
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


def choices_of(name: str) -> list[Choice]:
    """What a shape tries."""
    choices = CHOICES[SHAPES[name][3]]
    kinds = (
        [c for c in choices if isinstance(c, kind)] for kind in (ForwardConfig, BackwardConfig)
    )
    return [c for kind in kinds for c in kind[: 2 if name in SHORT else None]]


def measure_shape(
    name: str, works: dict[str, Callable[[], Any]], futures: dict[Choice, Future[None]]
) -> dict[str, Any]:
    """Errors and times of one shape; prints its table.

    Args:
        name: of the shape.
        works: of plain_work.
        futures: the compilations of its choices, done.
    """
    shape = SHAPES[name]
    result: dict[str, Any] = {"shape_B_S_H_D": shape}
    plain = {kind: measured(lambda work=work: work) for kind, work in works.items()}
    forward, both = plain["forward"], plain["both"]
    backward: float | str = f"{forward} {both}"
    if isinstance(forward, float) and isinstance(both, float):
        backward = round(both - forward, 4)
    result["sdpa_ms"] = {"forward": forward, "backward": backward}
    failed = {choice: future.exception() for choice, future in futures.items()}
    try:
        found = errors(shape, list(futures))
    except Exception as error:
        found = {}
        print(f"{name} errors: {reason(error)}")
    result["errors"] = found
    print(f"{name} {shape} errors of sdpa {found.get('sdpa')}")
    for kind, default in (
        (ForwardConfig, forward_config(shape[1])),
        (BackwardConfig, backward_config(shape[1])),
    ):
        times: dict[Choice, float | str] = {}
        for choice in (c for c in futures if isinstance(c, kind)):
            problem = failed[choice]
            times[choice] = (
                reason(problem) if problem else measured(lambda c=choice: work_of(shape, c))
            )
        print(f"  {kind.__name__}: sdpa {result['sdpa_ms'][kind.__name__.lower()]} ms")
        for choice, time in sorted(times.items(), key=lambda item: str(item[1])):
            mark = "default" if choice == default else ""
            error = found.get(label_of(choice))
            print(f"    {astuple(choice)!s:28} {time} {mark} {error}", flush=True)
        result[kind.__name__.lower()] = {str(astuple(c)): time for c, time in times.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of attention.json")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    results: dict[str, Any] = {}
    record = {
        **provenance(("torch",)),
        "device": torch.cuda.get_device_name(),
        "shapes": results,
    }
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {
            name: {c: pool.submit(compile_choice, SHAPES[name], c) for c in choices_of(name)}
            for name in sorted(arguments.shapes, key=list(SHAPES).index)
        }
        plain = {name: plain_work(SHAPES[name]) for name in futures}
        for works in plain.values():
            for work in works.values():
                work()  # torch compiles it while the other processes compile the kernels
        wait([future for mine in futures.values() for future in mine.values()])
        for name, mine in futures.items():
            results[name] = measure_shape(name, plain[name], mine)
            arguments.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record, indent=1)
            write_atomic(arguments.output / "attention.json", f"{text}\n".encode())


if __name__ == "__main__":
    main()
