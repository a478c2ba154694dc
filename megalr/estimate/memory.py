"""Peak memory of one rank, from the configuration alone: states, activations and buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megalr.config.schema import RunConfig
from megalr.engine.config import resolve_deepspeed_config
from megalr.errors import UserError
from megalr.estimate.activations import (
    LIBRARIES,
    ActivationBytes,
    Shape,
    activation_bytes,
    kernels_of,
)
from megalr.estimate.states import StateBytes, state_bytes
from megalr.estimate.tensors import Stored, drawing_bytes, plan_of, stored_tensors
from megalr.models.build import sizes_of
from megalr.models.config import DecoderConfig

GIB = 2**30

RESERVED = 0.15
"""Share of the peak that a GPU reserved more than this at most, over all recorded runs without
restarts (tests/estimate/test_recorded.py, benchmarks/lab/memory.md)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Attributes:
        states: weights, gradients, masters, moments and ZeRO's buffers.
        activations: of one micro-batch.
        accumulation: micro-batches per update.
        graphs: whether forward and backward run as a CUDA graph, which keeps its memory pool.
        embedding: gradients of the embedding tables, computed after those of all blocks.
        gpus: ranks of the run.
    """

    states: StateBytes
    activations: ActivationBytes
    accumulation: int
    graphs: bool
    embedding: int
    gpus: int

    @property
    def fixed(self) -> int:
        """Bytes that stay allocated from the first update on."""
        return sum(self._fixed_parts().values())

    @property
    def graph(self) -> int:
        """Bytes of the memory pool of a CUDA graph of forward and backward, which stays allocated.

        Gradients reuse the memory of activations that backward has consumed. Where blocks are
        recomputed they cannot: every block needs the same room again, and what earlier gradients
        leave free is fragmented. The embedding's gradient comes last. At the end the pool holds all
        gradients, under ZeRO 2 as well, and a second copy exists outside it where gradients
        accumulate in ``.grad``.
        """
        return sum(self._graph_parts().values())

    def _fixed_parts(self) -> dict[str, int]:
        s = self.states
        return {
            "weights": s.weights,
            "frozen weights, positions": s.frozen,
            "master weights": s.masters,
            "gradients, accumulated": s.gradients,
            "optimizer state": s.moments,
            "communication buffers": s.buckets,
        }

    def _work_parts(self) -> dict[str, int]:
        work = self.activations.work - LIBRARIES
        return {"head, backward of a block": work, "work space of libraries": LIBRARIES}

    def _graph_parts(self) -> dict[str, int]:
        s, a = self.states, self.activations
        adds_up = self.accumulation > 1 and s.wrapper != "BF16_Optimizer"
        beside = s.weights - self.embedding if a.again else 0
        return {
            "activations kept": a.kept,
            "gradients beside activations": max(a.kept + beside, s.weights) - a.kept,
            **self._work_parts(),
            "gradients outside the graph": s.weights if adds_up else 0,
        }

    def moments(self) -> dict[str, dict[str, int]]:
        """Bytes by part at each moment that can be the peak; parts of 0 bytes included.

        Activations and the temporary copies of the update do not exist together, except under a
        CUDA graph, whose memory stays; there the peak is the reserved memory.
        """
        s, a = self.states, self.activations
        weights = {"weights": s.weights, "frozen weights, positions": s.frozen}
        start = {**weights, "a piece as it is drawn": s.start}
        if self.graphs:
            update = {
                **self._fixed_parts(),
                **self._graph_parts(),
                "copies of the update": s.update,
            }
            return {"in the update": update, "at the start": start}
        # The first micro-batch starts without gradients; later ones find them.
        before = s.step_gradients if self.accumulation > 1 else 0
        beside = max(0, s.step_gradients - before - a.kept)
        backward = {
            "activations kept": a.kept,
            "gradients of earlier micro-batches": before,
            "gradients beside activations": beside,
            **self._work_parts(),
        }
        update = {"gradients": s.step_gradients, "copies of the update": s.update}
        return {
            "in forward and backward": {**self._fixed_parts(), **backward},
            "in the update": {**self._fixed_parts(), **update},
            "at the start": start,
        }

    def peak_parts(self) -> tuple[str, dict[str, int]]:
        """The moment of the peak, and its parts in bytes, which add up to :attr:`peak`."""
        moments = self.moments()
        name = max(moments, key=lambda moment: sum(moments[moment].values()))
        return name, {part: size for part, size in moments[name].items() if size}

    @property
    def peak(self) -> int:
        """Largest number of bytes allocated at one time; ``peak_memory_gib`` in metrics.jsonl."""
        return sum(self.peak_parts()[1].values())

    @property
    def needed(self) -> int:
        """Bytes that a GPU should have: the peak and the error bound, CUDA, NCCL."""
        return self.peak + self.bound + self.outside

    @property
    def bound(self) -> int:
        """Bytes that a GPU may reserve beyond the peak: ``RESERVED`` of it."""
        return math.ceil(RESERVED * self.peak)

    @property
    def outside(self) -> int:
        """Bytes outside of PyTorch's allocator, a rule of thumb: the CUDA context, and NCCL."""
        return GIB if self.gpus == 1 else 2 * GIB

    def as_json(self) -> dict[str, Any]:
        """The estimate in bytes, with the parts of the peak."""
        moment, parts = self.peak_parts()
        return {
            "moment": moment,
            "parts": parts,
            "peak": self.peak,
            "error_bound": self.bound,
            "outside_of_pytorch": self.outside,
            "needed": self.needed,
            "host": self.states.on_host,
        }

    def table(self) -> str:
        """Lines of ``name  GiB``: parts that add up to the peak as printed, and what it needs."""
        moment, parts = self.peak_parts()
        rows = list(parts.items())
        lines, total, shown = [], 0, 0
        for name, size in rows:
            # A row is the step of the rounded sums, so that the printed rows add up.
            total, before = total + size, shown
            shown = round(1000 * total / GIB)
            lines.append(f"{name:<40}{(shown - before) / 1000:10.3f}")
        more = f"error bound, {RESERVED:.0%} of the peak"
        lines += [
            "-" * 50,
            f"{'peak':<40}{shown / 1000:10.3f}  {moment}",
            f"{more:<40}{self.bound / GIB:10.3f}  allocator's fragments, as recorded",
            f"{'outside of PyTorch':<40}{self.outside / GIB:10.3f}  CUDA context, NCCL",
            f"{'a GPU should have':<40}{self.needed / GIB:10.3f}",
        ]
        if self.states.on_host:
            lines.append(f"{'in host memory':<40}{self.states.on_host / GIB:10.3f}")
        return "\n".join(lines)


def data_parallel_size(gpus: int, tensor: int) -> int:
    """Number of data-parallel ranks.

    Raises:
        UserError: ``tensor`` does not divide ``gpus``.
    """
    if gpus < 1 or tensor < 1 or gpus % tensor:
        raise UserError(
            f"{gpus} GPUs cannot be cut into tensor-parallel groups of {tensor}: use a divisor"
        )
    return gpus // tensor


def estimate_memory(
    config: RunConfig, ds_user: dict[str, Any], source: str, gpus: int, hopper: bool = True
) -> MemoryEstimate:
    """Memory of one rank of a run on CUDA GPUs with Triton.

    Args:
        config: the run; the sizes of a pretrained model must have been filled in.
        ds_user: the user's DeepSpeed JSON.
        source: its name in messages.
        gpus: ranks of the run.
        hopper: whether the GPUs are those that the custom attention kernels are written for (H100,
            H200); the other custom kernels run on any.

    Raises:
        UserError: settings that do not go together, batches or layouts that do not divide.
    """
    parallel = config.parallel
    data_size = data_parallel_size(gpus, parallel.tensor)
    ds_config = resolve_deepspeed_config(config, ds_user, source, data_size)
    sizes = sizes_of(config)
    plan = plan_of(sizes, config.method, parallel.tensor, parallel.layout)
    tensors = stored_tensors(sizes, config.method, plan)
    shape = Shape(
        tokens=config.train.micro_batch_size * config.data.sequence_length,
        element=4 if config.train.precision == "fp32" else 2,
        compiled=config.train.compile,
        recompute=config.train.activation_checkpointing,
        kernels=kernels_of(config, sizes, plan, hopper),
        masked=config.data.sequence_length if config.data.document_mask else 0,
    )
    return MemoryEstimate(
        state_bytes(
            config,
            ds_config,
            tensors,
            sizes.num_layers,
            data_size,
            drawing_bytes(sizes, config.method, plan),
        ),
        activation_bytes(sizes, config.method, plan, shape),
        ds_config["gradient_accumulation_steps"],
        config.train.cuda_graphs,
        shape.element * _table_numbers(sizes, tensors),
        gpus,
    )


def _table_numbers(sizes: DecoderConfig, tensors: list[Stored]) -> int:
    """Elements of the embedding tables whose gradients come last; a tied table does not count."""
    tables = ("positions",) if sizes.tie_embeddings else ("positions", "embedding")
    return sum(tensor.numel for tensor in tensors if tensor.name in tables)
