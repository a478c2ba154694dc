"""Bytes of weights, gradients, masters and optimizer state on one rank, by ZeRO stage.

The class in which DeepSpeed wraps the optimizer decides which buffers exist (table in
docs/dev/deepspeed-notes.md); their sizes follow from the tensors. tests/estimate compares them with
the buffers of live engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megalr.config.schema import RunConfig
from megalr.engine.config import is_unwrapped
from megalr.estimate.tensors import TRAINED, Stored, count, in_one_piece, piece_of
from megalr.models.config import round_up
from megalr.optim.adam_h import BLOCK, MINIMUM
from megalr.sharding.exchange import BUCKET_ELEMENTS

ALLREDUCE_ELEMENTS = 500_000_000
"""Elements after which DeepSpeed closes a bucket of its plain all-reduce (stage 0 and 1)."""

ORTHOGONAL = ("muon", "normuon")
"""Optimizers that orthogonalize the momentum of matrices, chunk by chunk."""
ORTHOGONAL_BYTES = 14
"""Temporary bytes for each element of a chunk, of the chosen ones with a fraction below 1: float32
copies of the gradients or of the updates, and the iteration's matrices in 16 bits."""

PROJECTED = ("galore", "fira", "golore", "apollo", "apollo_mini")


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank.

    Attributes:
        wrapper: DeepSpeed's class around the optimizer; "none" where it works on the weights
            themselves (float32 or paper_bf16 without ZeRO).
        weights: the parameters of the forward pass.
        frozen: weights without gradient, and indices of sparse entries.
        masters: float32 (paper_bf16: bfloat16) copies that the optimizer updates.
        gradients: accumulated gradients that exist between micro-batches.
        moments: the optimizer's state.
        buckets: buffers of ZeRO's reductions and gathers.
        step_gradients: ``.grad`` of the parameters, written by backward; with several micro-batches
            they stay until the update.
        update: temporary memory while the engine reduces gradients and steps.
        start: beside the weights that stay, what exists at most while the weights are drawn: a
            matrix in float32, at ZeRO 3 also a piece of the model that is not shared out yet.
        on_host: bytes of masters, their gradients and moments in host memory (offload); not counted
            in the fields above.
    """

    wrapper: str
    weights: int
    frozen: int
    masters: int
    gradients: int
    moments: int
    buckets: int
    step_gradients: int
    update: int
    start: int
    on_host: int = 0


@dataclass(frozen=True)
class Numbers:
    """The quantities that determine the sizes of gradient buffers.

    Attributes:
        weight, master, added: bytes per element of weights, masters and accumulated gradients.
        ranks: data-parallel ranks.
        accumulation: micro-batches per update.
        graphs: ``train.cuda_graphs``.
    """

    weight: int
    master: int
    added: int
    ranks: int
    accumulation: int
    graphs: bool


def wrapper_name(precision: str, stage: int, accumulation: str, offload: bool) -> str:
    """The class that wraps the optimizer; ``accumulation``: dtype of accumulated gradients."""
    if stage == 0:
        return "none" if is_unwrapped(precision, stage) else "FP16_UnfusedOptimizer"
    if stage == 3:
        return "DeepSpeedZeroOptimizer_Stage3"
    if stage == 1 and precision != "fp32" and accumulation == "fp32" and not offload:
        return "BF16_Optimizer"
    return "DeepSpeedZeroOptimizer"


def group_sizes(
    tensors: list[Stored], layers: int, split_targets: bool, by_kind: bool = False
) -> dict[str, int]:
    """Elements of each parameter group.

    Only for some optimizers dense targets are a group of their own, or (``by_kind``) embedding,
    head and sparse values.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.group in TRAINED:
            merged = tensor.group == "targets" and not split_targets
            name = "matrices" if merged else tensor.group
            name = _APART.get(tensor.kind, name) if by_kind else name
            sizes[name] = sizes.get(name, 0) + tensor.numel * tensor.times(layers)
    order = ("factors", "targets", "matrices", *dict.fromkeys(_APART.values()), "vectors")
    return {name: sizes[name] for name in order if name in sizes}


_APART = {"embedding": "embedding", "positions": "embedding", "head": "head", "values": "sparse"}
"""Groups of SCALE by the kind of a tensor."""


def state_bytes(
    config: RunConfig,
    ds_config: dict[str, Any],
    tensors: list[Stored],
    layers: int,
    data_size: int,
    drawing: dict[str, int],
) -> StateBytes:
    """Bytes on one of ``data_size`` data-parallel ranks; ``drawing`` from tensors.drawing_bytes.

    Matrix optimizers keep the states of a matrix on one rank: their moments are the average.
    """
    zero = ds_config["zero_optimization"]
    stage, precision = zero["stage"], config.train.precision
    accumulation = ds_config["data_types"]["grad_accum_dtype"]
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    wrapper = wrapper_name(precision, stage, accumulation, offload)
    weight = 4 if precision == "fp32" else 2
    master = 2 if precision == "paper_bf16" else 4
    added = 4 if accumulation == "fp32" else 2

    groups = group_sizes(tensors, layers, _splits_targets(config), config.optimizer.name == "scale")
    total = sum(groups.values())
    flat = {name: round_up(size, 2 * data_size) for name, size in groups.items()}
    if stage == 0:
        share = held = total
    elif stage == 3:
        repeat = [(t, t.times(layers)) for t in tensors if t.group in TRAINED]
        share = sum(math.ceil(t.numel / data_size) * times for t, times in repeat)
        held = share
    else:
        held, share = sum(flat.values()), sum(flat.values()) // data_size
    frozen = _frozen(tensors, layers, weight, data_size if stage == 3 else 1)
    moments = math.ceil(moment_bytes(config, tensors, layers) * share / total)
    masters = 0 if wrapper == "none" else master * share
    numbers = Numbers(
        weight,
        master,
        added,
        data_size,
        ds_config["gradient_accumulation_steps"],
        config.train.cuda_graphs,
    )
    gradients, buckets, step, update = _gradient_bytes(wrapper, zero, held, share, flat, numbers)
    if stage == 3:
        buckets += weight * _gathered(config, tensors, layers, zero)
    if config.method.name == "loro":
        moment = 2 if precision == "paper_bf16" else 4
        update = max(update, math.ceil(moment * _directions(groups) * share / total))
    if config.optimizer.name in (*ORTHOGONAL, "spectron"):
        # Beside the copies of gradients, some of which live during the step.
        chunk = orthogonalized_together(tensors, layers, share / total, config.parallel.tensor)
        update += ORTHOGONAL_BYTES * chunk
    host = 0
    if offload:
        # In host memory beside a copy of the weights; ZeRO 2 adds micro-batches up on the device.
        host, masters, moments, update = masters + moments + (master + weight) * share, 0, 0, 0
        gradients = gradients if stage == 2 and added != weight else 0
        buckets += weight * max(t.numel for t in tensors if t.group in TRAINED)
    return StateBytes(
        wrapper,
        weight * held,
        frozen,
        masters,
        gradients,
        moments,
        buckets,
        step,
        update,
        _start(tensors, weight if stage == 3 else 0, drawing),
        host,
    )


def _start(tensors: list[Stored], whole: int, drawing: dict[str, int]) -> int:
    """Largest temporary memory of a piece while it is drawn; ``whole``: bytes of each of its
    elements that come on top of those that stay."""
    stored = [tensor for tensor in tensors if tensor.group != "indices"]
    sizes = {piece: in_one_piece(t for t in stored if piece_of(t) == piece) for piece in drawing}
    return max(drawing[piece] + whole * size for piece, size in sizes.items())


def _splits_targets(config: RunConfig) -> bool:
    """Whether the update rule keeps dense target matrices in a parameter group of their own."""
    own_rules = ("spam", "stable_spam", *ORTHOGONAL)
    return config.method.name in PROJECTED or config.optimizer.name in own_rules


def orthogonalized_together(
    tensors: list[Stored], layers: int, share: float, tensor_ranks: int = 1
) -> int:
    """Elements of the largest chunk of matrices that are orthogonalized at a time on a rank.

    ``share``: the part of all matrices that the rank owns. Tensor-parallel ranks hold parts of the
    matrices of a chunk and share the whole ones, so that a rank may have one more than its share.
    """
    shapes = [(m * n, t.times(layers)) for t in tensors for m, n in t.matrices]
    owned = math.ceil(share * sum(numel * times for numel, times in shapes))
    largest = max((numel for numel, _ in shapes), default=0)
    return max(largest, min(BUCKET_ELEMENTS, owned)) + (tensor_ranks - 1) * largest


def _directions(groups: dict[str, int]) -> int:
    """Temporary elements of LORO's step: the directions of all groups live until its end, together
    with the denominators of one group."""
    most = before = 0
    for size in groups.values():
        most = max(most, before + 2 * size)
        before += size
    return most


def _frozen(tensors: list[Stored], layers: int, weight: int, parts: int) -> int:
    dense = count(tensors, layers, "frozen")
    positions = count(tensors, layers, "indices")
    return weight * math.ceil(dense / parts) + 4 * positions


def _gradient_bytes(
    wrapper: str,
    zero: dict[str, Any],
    held: int,
    share: int,
    flat: dict[str, int],
    size: Numbers,
) -> tuple[int, int, int, int]:
    """Bytes of (accumulated gradients, buckets, ``.grad``, what exists only in the update).

    As patched by megalr (engine.patches, engine.unwrapped_step). On one rank nothing is reduced.
    """
    weight, added, alone = size.weight, size.added, size.ranks == 1
    if wrapper == "none":
        return 0, 0, weight * held, 0 if alone else weight * min(held, ALLREDUCE_ELEMENTS)
    if wrapper == "FP16_UnfusedOptimizer":
        # The all-reduce flattens a bucket; afterwards every gradient is copied to float32.
        return 0, 0, weight * held, max(weight * min(held, ALLREDUCE_ELEMENTS), 4 * held)
    group = max(flat.values())
    if wrapper == "BF16_Optimizer":
        # With several micro-batches a group's gradients are gathered in bf16 before they are added,
        # and a single rank rounds a group's sums. Several ranks reduce buckets of whole groups.
        gathered = weight * group if size.accumulation > 1 else 0
        return (
            added * held,
            0,
            weight * held,
            gathered if alone else _reduced(flat, added),
        )
    stage, bucket = zero["stage"], int(zero["reduce_bucket_size"])
    copies = 2 if zero["overlap_comm"] and stage < 3 else 1
    flat_share = size.master * group // size.ranks
    if stage == 1 and added == weight:
        # Gradients are gathered into buckets that replace them, and each bucket is flattened again
        # for the reduction. The gradients of a CUDA graph stay beside them.
        buckets = 2 * min(bucket, held) + (held if size.graphs else 0)
        return 0, 0, weight * held, (0 if alone else weight * buckets) + flat_share
    if stage == 1:
        return 0, copies * added * bucket, (weight + added) * held, added * share + flat_share
    if stage == 2:
        # A full bucket is flattened for the reduction, and in float32 for the accumulation.
        moving = min(bucket, held) * (weight + (added if added != weight else 0))
        return added * share, copies * weight * bucket + moving, 0, flat_share
    # The step copies the gradients of one sub-group at a time.
    most = min(share, -(-group // size.ranks), int(zero["sub_group_size"]))
    # Gradients wait until they fill a bucket; two more are copied, one of which is being reduced.
    return added * share, 3 * weight * min(bucket, held), 0, size.master * most


def _reduced(flat: dict[str, int], added: int) -> int:
    """Bytes of the copies that DeepSpeed's plain all-reduce of flat groups makes of one bucket.

    A bucket is converted to bf16; one of several groups is flattened before.
    """
    most = groups = elements = 0
    for number, size in enumerate(flat.values(), 1):
        groups, elements = groups + 1, elements + size
        if elements > ALLREDUCE_ELEMENTS or number == len(flat):
            most = max(most, (2 if groups == 1 else added + 2) * elements)
            groups = elements = 0
    return most


def _gathered(config: RunConfig, tensors: list[Stored], layers: int, zero: dict[str, Any]) -> int:
    """Most elements of gathered weights at stage 3: the model, or what its limits allow.

    Prefetching stops at one limit and the other keeps what is used again soon; beyond them there
    are the block at work and the tensor with which a prefetch ends. Blocks that are neither
    compiled nor recomputed save views of their weights for the backward pass, which keep them all.
    """
    gathered = [t for t in tensors if t.group in (*TRAINED, "frozen")]
    limits = zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]
    block = in_one_piece(t for t in gathered if t.block)
    most = int(max(limits)) + block + max(t.numel for t in gathered)
    model = sum(t.numel * t.times(layers) for t in gathered)
    train = config.train
    keeps_views = not train.compile and train.activation_checkpointing == "none"
    return model if keeps_views else min(most, model)


def moment_bytes(config: RunConfig, tensors: list[Stored], layers: int) -> int:
    """Bytes of the optimizer's state of the whole model (one tensor-parallel rank), unpadded.

    The formulas of docs/methods.md, without the scalars kept per tensor.
    """
    element = 2 if config.train.precision == "paper_bf16" else 4
    scale = config.optimizer.name == "scale"
    tied = all(tensor.kind != "head" for tensor in tensors)
    bytes_ = 0.0
    for tensor in tensors:
        if tensor.group in TRAINED:
            once = _moments_of(tensor, config, element)
            once = element * _scale_state(tensor, tied) if scale else once
            bytes_ += once * tensor.times(layers)
    return math.ceil(bytes_)


def _moments_of(tensor: Stored, config: RunConfig, element: int) -> float:
    method, optimizer = config.method, config.optimizer
    if method.name in PROJECTED and tensor.group == "targets":
        return sum(_projected_state(m, n, method, element) for m, n in tensor.matrices)
    if optimizer.name in ORTHOGONAL and tensor.matrices:
        rows = sum(m for m, _ in tensor.matrices) if optimizer.name == "normuon" else 0
        return element * tensor.numel + 4 * rows
    if optimizer.name == "spectron" and tensor.group == "factors":
        inner = sum(min(shape) for shape in tensor.matrices)  # r of every factor
        return element * tensor.numel + 4 * inner
    density = getattr(optimizer, "density", None)
    if optimizer.name == "spam" and tensor.group == "targets" and density not in (None, 1):
        return 2 * element * density * tensor.numel + tensor.numel
    return 2 * element * tensor.numel


def _scale_state(tensor: Stored, tied: bool) -> int:
    """Elements of SCALE's state: momentum of the head, Adam's moments of vectors."""
    if tensor.group == "vectors" or tensor.kind == "values":
        return 2 * tensor.numel
    return tensor.numel * (_APART.get(tensor.kind) == ("embedding" if tied else "head"))


def _projected_state(m: int, n: int, method: Any, element: int) -> float:
    """Bytes for one m x n target: projectors and the two moments inside the subspace."""
    r = method.rank
    kind = getattr(method, "proj_type", "std")
    columns = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}.get(kind)
    if columns is None:  # full: both sides
        projectors, low = (m + n) * r, r * r
    else:
        projectors, low = (n * r, m * r) if columns else (m * r, n * r)
    if method.name in ("apollo", "apollo_mini") and method.proj == "random":
        projectors = 0  # drawn again from its seed
    if getattr(method, "state_bits", 32) == 8 and low >= MINIMUM:
        return element * projectors + 2 * (low + 4 * math.ceil(low / BLOCK))
    return element * (projectors + 2 * low)
