"""Numbers that tensor parallelism sends for a micro-batch: the table of docs/parallelism.md."""

from __future__ import annotations

from dataclasses import dataclass

from megalr.layers.linear import FactorizedLinear, FullRankLinear, GroupedLinear
from megalr.layers.lora import LoRALinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.decoder import Decoder


@dataclass(frozen=True)
class Traffic:
    """Numbers that enter collectives on each rank, in one direction (forward or backward).

    On a ring of p ranks a rank sends 2 (p - 1) / p times the numbers of an all-reduce, and
    (p - 1) / p times those of an all-gather (of the whole result) or a reduce-scatter.

    Attributes:
        reduced: all-reduced, of each token, in the compute dtype.
        reduced_float32: all-reduced, of each token, in float32 (norms, cross entropy).
        gathered: of each token, brought together by all-gather.
        scattered: of each token, summed by reduce-scatter.
        weights: all-reduced of each micro-batch, whatever its tokens (gradients of weights that
            are not cut but work on a cut activation), in the compute dtype.
    """

    reduced: int = 0
    reduced_float32: int = 0
    gathered: int = 0
    scattered: int = 0
    weights: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.reduced + other.reduced,
            self.reduced_float32 + other.reduced_float32,
            self.gathered + other.gathered,
            self.scattered + other.scattered,
            self.weights + other.weights,
        )

    def bytes_sent(self, tokens: int, ranks: int, itemsize: int = 2) -> float:
        """Bytes that each rank of a ring sends for a micro-batch of ``tokens``."""
        share = (ranks - 1) / ranks
        summed = itemsize * (tokens * self.reduced + self.weights) + 4 * tokens * (
            self.reduced_float32
        )
        moved = itemsize * tokens * (self.gathered + self.scattered)
        return share * (2 * summed + moved)


def traffic(decoder: Decoder) -> tuple[Traffic, Traffic]:
    """What one training micro-batch sends going forward, and going back (no recomputation)."""
    forward, backward = block_traffic(decoder)
    plan, h = decoder.plan, decoder.config.hidden_size
    if not plan.parallel:
        return forward, backward
    # The embedding, the norm before the head, and the three numbers of the cross entropy.
    last_norm = sum(p.numel() for p in decoder.norm.parameters())
    if plan.cut_residual:
        forward += Traffic(scattered=h, gathered=h, reduced_float32=3)
        backward += Traffic(scattered=h, gathered=h, weights=last_norm)
    else:
        forward += Traffic(reduced=h, reduced_float32=3)
        backward += Traffic(reduced=h, weights=last_norm)
    return forward, backward


def block_traffic(decoder: Decoder) -> tuple[Traffic, Traffic]:
    """The part of :func:`traffic` that belongs to the blocks."""
    forward = backward = Traffic()
    if decoder.plan.cut_residual:
        forward += Traffic(reduced_float32=2 * decoder.config.num_layers)
    for linear in decoder.linears():
        onward, back = _of_linear(linear)
        forward, backward = forward + onward, backward + back
    return forward, backward


def _of_linear(linear: GroupedLinear) -> tuple[Traffic, Traffic]:
    """What the matrices of one group send forward and backward."""
    shape = linear.shape
    if shape.cut.mesh.tensor_size == 1:
        return Traffic(), Traffic()
    n, m = shape.in_features, sum(shape.out_features)
    forward = backward = 0
    weights = 0
    dense = isinstance(linear, FullRankLinear | LoRALinear | SLTrainLinear)
    if dense:
        forward += m * shape.cut.inputs
        backward += n * shape.cut.outputs
    if isinstance(linear, SLTrainLinear):
        stacked = len(shape.names) * linear.rank
        weights = stacked * n * shape.cut.outputs + m * linear.rank * shape.cut.inputs
    elif isinstance(linear, FactorizedLinear):
        stacked = len(shape.names) * linear.rank
        forward += stacked * shape.cut.inputs
        backward += stacked * shape.cut.outputs
    return Traffic(reduced=forward), Traffic(reduced=backward, weights=weights)
