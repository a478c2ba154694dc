"""What tensor and data parallelism send: the messages of a micro-batch, the bytes of an update.

tests/estimate compares the messages with those that decoders on several ranks send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalr.estimate.tensors import DENSE_INSIDE, MatrixGroup, matrix_groups
from megalr.models.config import DecoderConfig
from megalr.tensor_parallel.plan import Plan


@dataclass(frozen=True)
class Message:
    """A collective of the tensor-parallel group.

    Attributes:
        numbers: numbers a token that are summed or gathered.
        element: bytes of a number.
        kind: all_reduce, all_gather or reduce_scatter.
        once: numbers besides that do not depend on the tokens (gradients of weights).
    """

    numbers: float
    element: int
    kind: str = "all_reduce"
    once: int = 0

    def size(self, tokens: int) -> float:
        """Bytes of the whole message, before it is cut or after it was gathered."""
        return self.element * (tokens * self.numbers + self.once)


Messages = list[Message]


def block_messages(
    sizes: DecoderConfig, method: Any, plan: Plan, element: int = 2, layer: int = 0
) -> tuple[Messages, Messages]:
    """(forward, backward) messages of the block ``layer``; matrices of other ranks send apart.

    column_row: matrices that read the residual stream sum the gradient of their input, those that
    write it sum their output; a factorized matrix sums its bottleneck instead. bottleneck: every
    layer sums its bottlenecks both ways, and behind a norm one float32 number a token in forward; a
    norm after its matrices also in backward. Norms of q and k: over heads, the gradient of the
    weight that the heads share; over the whole width, one float32 number a token both ways.
    """
    forward: Messages = []
    backward: Messages = []
    if not plan.parallel:
        return forward, backward
    for group in matrix_groups(sizes, method, plan, layer):
        reads = group.name in ("qkv", "into")
        for part in group.layers():
            if plan.sharded_residual:
                sums = Message(sum(part.ranks), element)
                forward += [sums, Message(1, 4)] if reads else [sums]
                backward.append(sums)
                continue
            (backward if reads else forward).extend(_sums(part, method, reads, element))
            if part.factorized and method.name == "sltrain":
                # The factor that is not cut meets a part of dY'X on each rank.
                whole = len(part.rows) * part.n if reads else sum(part.rows)
                backward.append(Message(0, element, once=whole * part.ranks[0]))
    if plan.sharded_residual and sizes.norm_order == "post":
        backward += [Message(1, 4)] * 2
    if sizes.qk_norm == "head":
        backward += [Message(0, element, once=width) for width in sizes.qk_norm_widths]
    elif sizes.qk_norm == "full":
        forward += [Message(1, 4)] * 2
        backward += [Message(1, 4)] * 2
    return forward, backward


def _sums(group: MatrixGroup, method: Any, reads: bool, element: int) -> Messages:
    """What the matrices of one layer sum in the direction in which it sums at all."""
    whole = Message(group.n if reads else sum(group.rows), element)
    if not group.factorized or method.name == "sltrain":
        return [whole]
    bottleneck = Message(sum(group.ranks), element)
    return [whole, bottleneck] if method.name in DENSE_INSIDE else [bottleneck]


def end_messages(sizes: DecoderConfig, plan: Plan, element: int = 2) -> tuple[Messages, Messages]:
    """(forward, backward) messages of embedding, last norm, head and loss.

    Embedding and head are cut by rows of the vocabulary. column_row: the embedding's parts are
    summed, and so is the gradient of the last norm's input. bottleneck: reduce-scatter after the
    embedding and all-gather before the last norm, the reverse in backward. The loss sums three
    float32 numbers a token; the gradients of the last norm's weights are summed.
    """
    if not plan.parallel:
        return [], []
    h = sizes.hidden_size
    loss, norm = [Message(1, 4), Message(2, 4)], [Message(0, element, once=h)]
    if sizes.norm == "layernorm":
        norm *= 2  # its bias as well
    if plan.sharded_residual:
        scattered, gathered = (
            Message(h, element, "reduce_scatter"),
            Message(h, element, "all_gather"),
        )
        return [scattered, gathered, *loss], [scattered, gathered, *norm]
    return [Message(h, element), *loss], [Message(h, element), *norm]


@dataclass(frozen=True)
class DataTraffic:
    """Bytes of a rank's data-parallel collectives.

    Attributes:
        reduced: bytes of gradients that are all-reduced in a micro-batch (ZeRO 2).
        scattered: bytes reduce-scattered in a micro-batch (ZeRO 3).
        fetched: bytes of weights all-gathered in a micro-batch (ZeRO 3).
        reduced_once: bytes all-reduced in an update (ZeRO 0 and 1).
        gathered_once: bytes of weights all-gathered after the step (ZeRO 1 and 2).
    """

    reduced: int = 0
    scattered: int = 0
    fetched: int = 0
    reduced_once: int = 0
    gathered_once: int = 0


def data_traffic(stage: int, trained: int, frozen: int = 0, element: int = 2) -> DataTraffic:
    """Bytes for ``trained`` elements with gradients and ``frozen`` ones without, by ZeRO stage.

    DeepSpeed's stage 2 reduces in every micro-batch, by all-reduces of buckets; stage 3 fetches the
    weights for forward and again for backward.
    """
    size = element * trained
    if stage == 0:
        return DataTraffic(reduced_once=size)
    if stage == 1:
        return DataTraffic(reduced_once=size, gathered_once=size)
    if stage == 2:
        return DataTraffic(reduced=size, gathered_once=size)
    return DataTraffic(scattered=size, fetched=2 * (size + element * frozen))
