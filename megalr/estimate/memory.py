"""Peak memory of one rank, from the configuration alone: states, activations and buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalr.config.schema import RunConfig
from megalr.engine.config import resolve_deepspeed_config
from megalr.errors import UserError
from megalr.estimate.activations import ActivationBytes, Shape, activation_bytes, kernels_of
from megalr.estimate.states import StateBytes, state_bytes
from megalr.estimate.tensors import Stored, plan_of, stored_tensors
from megalr.models.build import sizes_of
from megalr.models.config import DecoderConfig

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Attributes:
        states: weights, gradients, masters, moments and ZeRO's buffers.
        activations: of one micro-batch.
        accumulation: micro-batches per update.
        graphs: whether forward and backward run as a CUDA graph, which keeps its memory pool.
        embedding: gradients of the embedding tables, computed after those of all blocks.
    """

    states: StateBytes
    activations: ActivationBytes
    accumulation: int
    graphs: bool
    embedding: int

    @property
    def fixed(self) -> int:
        """Bytes that stay allocated from the first update on."""
        s = self.states
        return s.weights + s.frozen + s.masters + s.gradients + s.moments + s.buckets

    @property
    def micro_batch(self) -> int:
        """Bytes of forward and backward."""
        return self.activations.kept + self.activations.work

    @property
    def graph(self) -> int:
        """Bytes of the memory pool of a CUDA graph of forward and backward, which stays allocated.

        Gradients reuse the memory of activations that backward has consumed. Where blocks are
        recomputed they cannot: every block needs the same room again, and what earlier gradients
        leave free is fragmented. The embedding's gradient comes last. At the end the pool holds all
        gradients, under ZeRO 2 as well, and a second copy exists outside it where gradients
        accumulate in ``.grad``.
        """
        s, a = self.states, self.activations
        adds_up = self.accumulation > 1 and s.wrapper != "BF16_Optimizer"
        beside = s.weights - self.embedding if a.again else 0
        backward = max(a.kept + beside, s.weights)
        return backward + a.work + (s.weights if adds_up else 0)

    @property
    def reserved_at_start(self) -> int:
        """Bytes that the allocator has reserved before the first update while memory is plentiful.

        The float32 weights of the initialization are free by then, but fragmented, so activations
        cannot use that memory; it stays reserved until the graph capture empties the cache (a full
        device would do the same). A run needs :attr:`peak` only.
        """
        s = self.states
        return self.fixed - s.moments + self.graph + s.drawn

    @property
    def peak(self) -> int:
        """Largest number of bytes allocated at one time.

        Activations and the temporary copies of the update do not exist together, except under a
        CUDA graph; there the peak is the reserved memory, ``peak_memory_gib`` in metrics.jsonl.
        With ZeRO on many ranks it can be the initialization, which draws the whole model in float32
        on every rank.
        """
        s = self.states
        if self.graphs:
            return max(self.fixed + self.graph + s.update, s.drawn)
        # The first micro-batch starts without gradients; later ones find them.
        before = s.step_gradients if self.accumulation > 1 else 0
        growing = max(self.activations.kept, s.step_gradients - before) + self.activations.work
        return max(self.fixed + max(before + growing, s.step_gradients + s.update), s.drawn)

    def table(self) -> str:
        """Lines of ``name  GiB``, the total last."""
        s, a = self.states, self.activations
        rows = [
            ("weights", s.weights),
            ("frozen weights, positions", s.frozen),
            ("master weights", s.masters),
            ("gradients, accumulated", s.gradients),
            ("gradients of a micro-batch", s.step_gradients),
            ("optimizer state", s.moments),
            ("communication buffers", s.buckets),
            ("activations kept", a.kept),
            ("head, backward of a block", a.work),
            ("update: copies, directions", s.update),
        ]
        lines = [f"{name:<32}{size / GIB:10.3f}" for name, size in rows if size]
        how = "activations and the update's copies are not there together"
        if self.graphs:
            how = "gradients take the place of activations"
        lines += ["-" * 42, f"{'peak, GiB':<32}{self.peak / GIB:10.3f}  ({how})"]
        if s.on_host:
            lines.append(f"{'in host memory, GiB':<32}{s.on_host / GIB:10.3f}")
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
        kernels=kernels_of(config, sizes, plan, ds_config["zero_optimization"]["stage"], hopper),
        masked=config.data.sequence_length if config.data.document_mask else 0,
    )
    return MemoryEstimate(
        state_bytes(config, ds_config, tensors, sizes.num_layers, data_size),
        activation_bytes(sizes, config.method, plan, shape),
        ds_config["gradient_accumulation_steps"],
        config.train.cuda_graphs,
        shape.element * _table_numbers(sizes, tensors),
    )


def _table_numbers(sizes: DecoderConfig, tensors: list[Stored]) -> int:
    """Elements of the embedding tables whose gradients come last; a tied table does not count."""
    tables = ("positions",) if sizes.tie_embeddings else ("positions", "embedding")
    return sum(tensor.numel for tensor in tensors if tensor.name in tables)
