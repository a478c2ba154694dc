"""Causal attention with RoPE at 1,024 to 32,768 tokens, by each backend of torch, on one GPU.

    python benchmarks/attention_lengths.py --output results

For the heads of 60M to 7B models and of one with fewer key heads, in bfloat16: milliseconds of the
forward and of the backward pass of ``attention_reference`` by every backend, compiled and in a CUDA
graph as in training, on micro-batches of 16,384 tokens (32,768 at that length); the TFLOP/s of both
together, unmasked scores only; what the backend holds beyond its operands. Beforehand, on a small
shape, the error against float32 math, and whether the backward pass gives the same bits twice. The
fastest backend should be the one that torch takes by itself, which megalr leaves it to. A backend
that fails is recorded with the reason.

The file is saved after every length. A call with the ``--output`` of an earlier one measures the
lengths that have no times there; ``--again`` measures all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import provenance, stopped, write
from timing import attempt, cuda_device, milliseconds, peak_mib
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalr.errors import UserError, exit_cleanly
from megalr.kernels.attention import apply_rope, attention_reference
from megalr.kernels.document_mask import BlockMask, block_mask, document_bounds
from megalr.models.rope import rope_tables

# H, K, D and lengths. Shapes that differ in the number of heads alone need fewer.
SHAPES: dict[str, tuple[tuple[int, int, int], tuple[int, ...]]] = {
    "1b": ((32, 32, 64), (1024, 2048, 4096, 8192, 32768)),
    "7b": ((32, 32, 128), (1024, 2048, 4096, 8192)),
    "grouped": ((32, 8, 128), (2048, 8192)),
    "350m": ((16, 16, 64), (1024, 4096)),
    "60m": ((8, 8, 64), (1024, 4096)),
}
BACKENDS = ("torch", "cudnn", "flash", "flex")
TOKENS = 16_384
SMALL = (2, 512)
"""Sequences and length of the shape whose errors are measured."""
PARTS = ("o", "dq", "dk", "dv")

Heads = tuple[int, int, int]
Work = Callable[..., torch.Tensor]


def inputs_of(B: int, S: int, heads: Heads, device: str) -> list[torch.Tensor]:
    """q, k, v ``(B, S, heads * D)`` bfloat16 that need gradients, and do."""
    H, K, D = heads
    torch.manual_seed(0)
    draw = [torch.randn(B, S, n * D, device=device, dtype=torch.bfloat16) for n in (H, K, K, H)]
    return [*(x.requires_grad_() for x in draw[:3]), draw[3]]


def causal_blocks(B: int, S: int, device: str) -> BlockMask:
    """Causal attention in the form for FlexAttention."""
    place = torch.arange(S, dtype=torch.int32, device=device)
    return block_mask(document_bounds(place.expand(B, S)))


def work_of(name: str, B: int, S: int, D: int, device: str) -> Work:
    """Attention of q, k, v by a backend, rotations included."""
    rope = rope_tables(S, D, 10000.0, torch.device(device))
    if name == "flex":
        mask = causal_blocks(B, S, device)
        return lambda q, k, v: attention_reference(q, k, v, rope, mask, D)
    if name == "torch":
        return lambda q, k, v: attention_reference(q, k, v, rope, None, D)
    return lambda q, k, v: by_backend(q, k, v, rope, D, name == "cudnn")


def by_backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: torch.Tensor, D: int, cudnn: bool
) -> torch.Tensor:
    """``attention_reference`` by cuDNN or FlashAttention-2, without a mask.

    The operators are called directly: the cache of compiled graphs of torch 2.11 does not know
    which backends torch.nn.attention.sdpa_kernel has enabled.
    """
    q, k, v = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in (q, k, v))
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    aten = torch.ops.aten
    if cudnn:
        o = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0]
    else:
        o = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return o.transpose(1, 2).flatten(2)


def choice_of_torch(B: int, S: int, heads: Heads, device: str) -> str:
    """The backend that scaled_dot_product_attention takes by itself."""
    q, k, v = (
        x.unflatten(-1, (-1, heads[2])).transpose(1, 2) for x in inputs_of(B, S, heads, device)[:3]
    )
    grouped = heads[0] != heads[1]
    try:  # there is no public function that says it
        number = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=grouped)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"not known: {error}".splitlines()[0][:200]
    names = {int(value): name for name, value in SDPBackend.__members__.items()}
    return names.get(number, str(number))


def results_of(work: Work, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """o, dq, dk, dv."""
    *qkv, do = inputs
    o = work(*qkv)
    return [o.detach(), *torch.autograd.grad(o, qkv, do)]


def errors(heads: Heads, device: str) -> dict[str, Any]:
    """By backend: norm of the error over the norm, and whether two backward passes agree."""
    B, S = SMALL
    inputs = inputs_of(B, S, heads, device)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        exact = results_of(work_of("torch", B, S, heads[2], device), wide)
    found: dict[str, Any] = {}
    for name in BACKENDS:
        try:
            work = torch.compile(work_of(name, B, S, heads[2], device), dynamic=False)
            first, second = (results_of(work, inputs) for _ in range(2))
        except Exception as error:  # its times will fail as well, the others are to be measured
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        found[name] = {
            part: float(f"{(x.float() - y).norm() / y.norm():.2e}")
            for part, x, y in zip(PARTS, first, exact, strict=True)
        }
        pairs = zip(first, second, strict=True)
        found[name]["same_bits"] = all(torch.equal(x, y) for x, y in pairs)
    return found


def flops_of(B: int, S: int, heads: Heads) -> int:
    """FLOPs of both passes: seven products of the scores that causal masking keeps."""
    return 7 * B * S * (S + 1) * heads[0] * heads[2]


def measure(B: int, S: int, heads: Heads) -> dict[str, Any]:
    """All backends at one length."""
    inputs = inputs_of(B, S, heads, "cuda")
    backends: dict[str, dict[str, Any]] = {}
    for name in BACKENDS:
        torch.compiler.reset()
        work = torch.compile(work_of(name, B, S, heads[2], "cuda"), dynamic=False)
        both = attempt(lambda work=work: milliseconds(lambda: results_of(work, inputs)))
        if isinstance(both, str):
            backends[name] = {"failed": both[:200]}
            continue
        forward = attempt(lambda work=work: milliseconds(lambda: work(*inputs[:3])))
        assert isinstance(forward, float)
        backends[name] = {
            "forward_ms": forward,
            "backward_ms": round(both - forward, 4),
            "tflops": round(flops_of(B, S, heads) / both / 1e9, 1),
            "peak_mib": round(peak_mib(lambda work=work: results_of(work, inputs)), 1),
        }
    times = {
        name: found["forward_ms"] + found["backward_ms"]
        for name, found in backends.items()
        if "failed" not in found
    }
    return {
        "B": B,
        "S": S,
        "torch_takes": choice_of_torch(B, S, heads, "cuda"),
        "fastest": min(times, key=lambda name: times[name]) if times else None,
        "backends": backends,
    }


def row_of(name: str, found: dict[str, Any]) -> str:
    """One length as a line of text."""
    cells = [
        f"{backend} {one['forward_ms']:.3f} + {one['backward_ms']:.3f} ({one['tflops']:.0f})"
        if "failed" not in one
        else f"{backend} {one['failed'][:60]}"
        for backend, one in found["backends"].items()
    ]
    picks = f"fastest {found['fastest']}, torch takes {found['torch_takes']}"
    return f"{name} {found['B']} x {found['S']}: {'; '.join(cells)}; {picks}"


def measure_shapes(
    chosen: dict[str, tuple[int, ...]], results: dict[str, Any], keep: Callable[[], object]
) -> None:
    """Errors and times by shape, added to ``results``; what it has already is not measured again.

    Args:
        chosen: lengths by name of the shape.
        results: errors and rows by name of the shape.
        keep: called after each change of ``results``.
    """
    for name, lengths in chosen.items():
        heads, _ = SHAPES[name]
        if name not in results:
            results[name] = {"H_K_D": heads, "errors": errors(heads, "cuda"), "rows": []}
            print(name, results[name]["errors"], flush=True)
            keep()
        rows = {row["S"]: row for row in results[name]["rows"]}
        for S in lengths:
            if S in rows and rows[S]["fastest"] is not None:
                continue
            rows[S] = measure(max(1, TOKENS // S), S, heads)
            results[name]["rows"] = list(rows.values())
            print(row_of(name, rows[S]), flush=True)
            keep()


def main() -> None:
    """Measure the chosen shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of those of the shapes")
    parser.add_argument("--output", type=Path, help="folder of attention_lengths.json")
    parser.add_argument("--again", action="store_true", help="overwrite the file")
    arguments = parser.parse_args()
    if any(length < 1 for length in arguments.lengths or ()):
        raise UserError(f"--lengths {arguments.lengths}: give positive numbers of tokens")
    record: dict[str, Any] = {"device": cuda_device(), **provenance(("torch",))}
    record["cudnn"] = torch.backends.cudnn.version()
    path = arguments.output and arguments.output / "attention_lengths.json"
    earlier = {} if arguments.again else stopped(path, record, ("device", "versions", "cudnn"))
    record["shapes"] = earlier.get("shapes", {})
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured beside the default stream
    chosen = {name: tuple(arguments.lengths or SHAPES[name][1]) for name in arguments.shapes}
    measure_shapes(chosen, record["shapes"], lambda: path and write(path, record))


if __name__ == "__main__":
    exit_cleanly(main)
