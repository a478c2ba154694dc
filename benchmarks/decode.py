"""Prefill and decoding of dense and factorized exports by transformers: tokens/s and memory.

    python benchmarks/decode.py --sizes 1b --output results/decode_1b.json
    python benchmarks/decode.py --table results/decode_350m.json results/decode_1b.json

Models of the presets' shapes with random bf16 weights, prompts of 512 tokens, a static cache, 64
new tokens taken greedily. For every batch: prefill, and the decoding step in three ways: ``eager``,
launched by the host; ``graph``, the same kernels in one CUDA graph; ``compiled``, ``torch.compile``
in mode reduce-overhead, as ``generate()`` does it; half a minute a row. Ranks are the recipe's and
shares of the hidden size. The rows that tell most come first: graphs of the dense model and of the
recipe's rank, these two compiled, graphs of other ranks, of the sparse form, and eager steps. No
row is begun after ``--seconds`` of a size; those are listed as not measured.

The file is saved after every row. A call with the ``--output`` of an earlier one measures the rows
that have no result there; ``--again`` measures all.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import provenance, stopped, write
from timing import cuda_device

from megalr.errors import UserError, exit_cleanly
from megalr.hf.families import transformers_config
from megalr.hf.modeling_factorized import FACTORIZED, TRANSFORMERS
from megalr.models.config import PRESETS, DecoderConfig

PROMPT, NEW, REPEATS = 512, 64, 3
BATCHES = (1, 4, 16, 64)
EAGER_BATCHES, COMPILED_BATCHES = (1, 16), (1, 16)
RECIPE_RANKS = {"350m": 256, "1b": 512, "1b_padded": 512, "7b": 1024}
"""Sizes by name; padded: with ``--keep_padding`` of the export, since 1B's MLP is 5,461 wide."""

DENSITY = 0.03
WARM = 6  # steps before the timed ones: three captured or compiled, three more
GIB = 2**30
KEYS = ("size", "form", "rank", "shared", "way", "batch")
"""What tells one row from another."""
SAME = ("device", "versions", "prompt", "new_tokens", "dtype")
"""What the rows of one file share."""


@dataclass(frozen=True)
class Variant:
    """One way to store a model.

    Attributes:
        form: ``dense``, or a form of modeling_factorized.
        rank: r of every matrix; None for dense.
        shared: factors A of one input as one matrix.
    """

    form: str = "dense"
    rank: int | None = None
    shared: bool = False

    def settings(self, sizes: DecoderConfig) -> dict[str, Any]:
        """``factorization`` of a LLaMA model."""
        h, width, q, kv = sizes.hidden_size, sizes.intermediate_size, sizes.q_width, sizes.kv_width
        entries = {"q": h * q, "k": h * kv, "v": h * kv, "o": h * q}
        names = {f"self_attn.{key}_proj": number for key, number in entries.items()}
        names |= {f"mlp.{key}_proj": h * width for key in ("gate", "up", "down")}
        modules: dict[str, dict[str, Any]] = {name: {"rank": self.rank} for name in names}
        if self.form == "sparse":
            for name, number in names.items():
                modules[name]["entries"] = int(DENSITY * number)
        return {"form": self.form, "modules": modules, "shared": self.shared}


def sizes_of(name: str) -> DecoderConfig:
    """Of one of RECIPE_RANKS."""
    preset, _, padded = name.partition("_")
    sizes = PRESETS[f"llama_{preset}"]
    return replace(sizes, intermediate_size=sizes.padded_intermediate_size) if padded else sizes


def variants(sizes: DecoderConfig, recipe: int) -> list[Variant]:
    """Dense; the recipe's rank with and without shared A; 1/8, 1/4, 1/2 of h; sltrain's form."""
    ranks = {recipe, *(sizes.hidden_size // part for part in (8, 4, 2))}
    return [
        Variant(),
        Variant("product", recipe, True),
        Variant("product", recipe, False),
        *(Variant("product", rank, True) for rank in sorted(ranks - {recipe})),
        Variant("sparse", recipe),
    ]


def build(sizes: DecoderConfig, variant: Variant, device: str) -> Any:
    """A model with random bf16 weights."""
    dense = variant.form == "dense"
    config = transformers_config(sizes, "llama", PROMPT + NEW, factorized=not dense)
    if not dense:
        config.factorization = variant.settings(sizes)
    causal: Any = (TRANSFORMERS if dense else FACTORIZED)["llama"][2]
    with torch.device(device):
        model = causal._from_config(config, dtype=torch.bfloat16)
    return model.eval()


class Decoding:
    """A batch of prompts, its static cache and the token that comes next.

    Args:
        model: a causal language model.
        prompts: ``(B, S)`` ids.
        new: tokens to generate.
    """

    def __init__(self, model: Any, prompts: torch.Tensor, new: int) -> None:
        from transformers import StaticCache

        self.model, self.prompts, self.new = model, prompts, new
        room = max(new, WARM)
        self.cache = StaticCache(config=model.config, max_cache_len=prompts.shape[1] + room)
        self.token = prompts[:, :1].clone()  # (B, 1)

    def prefill(self) -> None:
        """Fill the cache from the prompts; the token after them."""
        self.cache.reset()
        self.advance(self.model, self.prompts)

    def advance(self, forward: Callable[..., Any], ids: torch.Tensor) -> None:
        """Append ``ids (B, S)`` to the cache; ``token`` is then the most probable next one."""
        out = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))

    def steps(self, step: Callable[[], object], count: int) -> list[torch.Tensor]:
        """Tokens ``(B, 1)`` of a prefill and ``count - 1`` steps."""
        self.prefill()
        tokens = [self.token.clone()]
        for _ in range(count - 1):
            step()
            tokens.append(self.token.clone())
        return tokens

    def eager(self) -> Callable[[], object]:
        """A step that the host launches."""
        return lambda: self.advance(self.model, self.token)

    def graph(self) -> Callable[[], object]:
        """The same step, replayed from a CUDA graph."""
        step = self.eager()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def compiled(self) -> Callable[[], object]:
        """The step as ``generate()`` compiles it for a static cache."""
        forward = torch.compile(self.model.__call__, mode="reduce-overhead")
        return lambda: self.advance(forward, self.token)


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time until the device is done."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def timed(decoding: Decoding, way: str, device: str) -> tuple[float, float]:
    """Median seconds of a prefill and of a step, over repeated generations."""
    decoding.prefill()
    step = getattr(decoding, way)()
    for _ in range(3):  # compiles, records
        step()
    eager = way == "eager"
    count = min(16, decoding.new) if eager else decoding.new

    def generate() -> None:
        for _ in range(count):
            step()

    prefills, steps = [], []
    for _ in range(1 if eager else REPEATS):
        prefills.append(seconds(decoding.prefill, device))
        steps.append(seconds(generate, device) / count)
    return statistics.median(prefills), statistics.median(steps)


@torch.no_grad()
def measure(model: Any, batch: int, way: str, device: str, prompt: int, new: int) -> dict[str, Any]:
    """Prefill and decoding of one batch; in one line why not, if it fails.

    ``way``: a method of Decoding.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator)
    if device == "cuda":
        gc.collect()  # the cache and graph of the row before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        prefill, step = timed(Decoding(model, prompts.to(device), new), way, device)
    except Exception as error:  # out of memory, ...: the other rows are to be measured
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "prefill_ms": round(1e3 * prefill, 3),
        "step_ms": round(1e3 * step, 4),
        "prefill_tokens_per_second": round(batch * prompt / prefill),
        "decode_tokens_per_second": round(batch / step),
        "peak_gib": round(peak / GIB, 3),
    }


def cells(chosen: list[Variant]) -> list[tuple[Variant, int, str]]:
    """Variant, batch and way of every row, those first that are worth most."""
    main, others = chosen[:2], chosen[2:]
    return [
        *((variant, batch, "graph") for variant in main for batch in BATCHES),
        *((variant, batch, "compiled") for variant in main for batch in COMPILED_BATCHES),
        *((variant, batch, "graph") for variant in others for batch in BATCHES),
        *((variant, batch, "eager") for variant in main for batch in EAGER_BATCHES),
    ]


def measure_size(
    name: str,
    budget: float,
    device: str,
    known: list[dict[str, Any]] | None = None,
    keep: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> list[dict[str, Any]]:
    """All rows of one size.

    Args:
        name: of the size.
        budget: seconds after which no row is begun.
        device: ``cuda``, or ``cpu`` for tests.
        known: rows of the size that were measured before; those without a result are repeated.
        keep: called with the rows after each that was measured.
    """
    sizes, started = sizes_of(name), time.perf_counter()
    rows = {tuple(row[key] for key in KEYS): row for row in known or []}
    built, model = None, None
    for variant, batch, way in cells(variants(sizes, RECIPE_RANKS[name])):
        row = {"size": name, **asdict(variant), "batch": batch, "way": way}
        place = tuple(row[key] for key in KEYS)
        if "failed" not in rows.get(place, {"failed": "not measured"}):
            continue
        if time.perf_counter() - started > budget:
            rows.setdefault(place, {**row, "failed": "not measured: out of time"})
            continue
        torch._dynamo.reset()  # what is compiled holds its model
        if variant != built:
            model = None  # before the next one takes memory
            gc.collect()
            model, built = build(sizes, variant, device), variant
        row["weights_gib"] = round(weight_bytes(model) / GIB, 3)
        rows[place] = row | measure(model, batch, way, device, PROMPT, NEW)
        print(json.dumps(rows[place]), flush=True)
        keep(list(rows.values()))
    return list(rows.values())


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and stored buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row of each variant and way, decoded tokens/s by batch and times the dense."""
    batches = sorted({row["batch"] for row in rows})
    lines = [
        "| size | form | rank | shared A | GiB of weights | way | "
        + " | ".join(f"decode, batch {batch}" for batch in batches)
        + " | prefill, largest batch |",
        "|---" * (len(batches) + 7) + "|",
    ]
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS[:-1]), {})[row["batch"]] = row
    for (size, form, rank, shared, way), found in groups.items():
        dense = groups.get((size, "dense", None, False, way), {})
        speeds = [
            _speed(found.get(batch), dense.get(batch), "decode_tokens_per_second")
            for batch in batches
        ]
        most = max(found)
        speeds.append(_speed(found[most], dense.get(most), "prefill_tokens_per_second"))
        weights = next((row["weights_gib"] for row in found.values() if "weights_gib" in row), "")
        cells = [size, form, rank or "", "yes" if shared else "", weights, way, *speeds]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _speed(row: dict[str, Any] | None, dense: dict[str, Any] | None, key: str) -> str:
    """Tokens/s, and its ratio to the dense model's."""
    if row is None or key not in row:
        return "" if row is None else "failed"
    ratio = f" ({row[key] / dense[key]:.2f}x)" if dense is not None and key in dense else ""
    return f"{row[key]:,}{ratio}"


def main() -> None:
    """Measure the sizes, or show recorded ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=RECIPE_RANKS, default=list(RECIPE_RANKS))
    parser.add_argument("--seconds", type=float, default=140.0, help="of each size")
    parser.add_argument("--output", type=Path, help="JSON file, continued if it exists")
    parser.add_argument("--again", action="store_true", help="overwrite the file")
    parser.add_argument("--table", type=Path, nargs="+", help="show these files, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        rows = [row for path in arguments.table for row in json.loads(path.read_text())["rows"]]
        print(table(rows))
        return
    if arguments.output is not None and arguments.output.suffix != ".json":
        raise UserError(f"--output {arguments.output}: name a JSON file")
    result: dict[str, Any] = {"device": cuda_device(), "rows": []}
    result |= provenance(("torch", "transformers", "triton"))
    result |= {"prompt": PROMPT, "new_tokens": NEW, "dtype": "bfloat16"}
    earlier = {} if arguments.again else stopped(arguments.output, result, SAME)
    by_size: dict[str, list[dict[str, Any]]] = {}
    for row in earlier.get("rows", []):
        by_size.setdefault(row["size"], []).append(row)

    def keep(size: str, rows: list[dict[str, Any]]) -> None:
        by_size[size] = rows
        result["rows"] = [row for rows in by_size.values() for row in rows]
        if arguments.output is not None:
            write(arguments.output, result)

    for name in arguments.sizes:
        known = by_size.get(name)
        rows = measure_size(name, arguments.seconds, "cuda", known, partial(keep, name))
        keep(name, rows)  # those without time too
    print(table(result["rows"]))


if __name__ == "__main__":
    exit_cleanly(main)
