"""The tensors of a model that one rank stores, and their sizes, from the configuration alone.

No module is built, so a 13B model takes a millisecond. tests/estimate compares the sizes with the
parameters of the decoder itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megalr.models.build import FACTORIZED, check_plan, make_plan
from megalr.models.config import DecoderConfig
from megalr.models.ranks import check_names, has_ranks, matrix_names, rank_of
from megalr.tensor_parallel.mesh import Mesh
from megalr.tensor_parallel.plan import SINGLE, Plan

DENSE_INSIDE = ("lora", "relora")
"""Factorized methods with a frozen dense matrix beside the factors."""


def plan_of(sizes: DecoderConfig, method: Any, tensor: int, layout: str) -> Plan:
    """The plan of ``tensor`` ranks, without their process groups.

    Raises:
        UserError: the model cannot be sharded that way.
    """
    return make_plan(sizes, method, Mesh(tensor_size=tensor), layout)


@dataclass(frozen=True)
class MatrixGroup:
    """The matrices of a block that read the same input, as stored, and their part on a rank.

    Attributes:
        name: qkv, o, into or down.
        n: columns, the same for all.
        rows: rows of each matrix.
        local_n, local_rows: columns and rows of a dense matrix on one tensor-parallel rank.
        factorized: whether the method stores factors.
        used: ``(m, n)`` of each matrix without padding.
        ranks: r of each matrix; empty if it is not factorized.
    """

    name: str
    n: int
    rows: tuple[int, ...]
    local_n: int
    local_rows: tuple[int, ...]
    factorized: bool
    target: bool
    used: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...] = ()

    def by_rank(self) -> list[tuple[int, list[int]]]:
        """Each rank with the matrices that have it, which are stored together."""
        return [
            (rank, [index for index, other in enumerate(self.ranks) if other == rank])
            for rank in dict.fromkeys(self.ranks)
        ]

    def layers(self) -> list[MatrixGroup]:
        """What is stored, and computed, together: matrices of equal rank, or all dense ones."""
        return [
            replace(
                self,
                rows=tuple(self.rows[i] for i in members),
                local_rows=tuple(self.local_rows[i] for i in members),
                used=tuple(self.used[i] for i in members),
                ranks=(rank,) * len(members),
            )
            for rank, members in self.by_rank()
        ] or [self]


@dataclass(frozen=True)
class Stored:
    """One tensor of a rank.

    Attributes:
        name: of the kind of tensor; equal ones of different blocks share it.
        numel: elements that this rank stores.
        group: parameter group: factors, targets, matrices or vectors; frozen (no gradient) or
            indices (int32 positions of SLTrain).
        block: whether it belongs to a block.
        layer: the one block that has it; None: all blocks, so there are ``num_layers`` of it.
        matrices: ``(m, n)`` of the target matrices stacked in it, for optimizers that see them.
    """

    name: str
    numel: int
    group: str
    block: bool = False
    matrices: tuple[tuple[int, int], ...] = ()
    layer: int | None = None

    def times(self, layers: int) -> int:
        """How many there are in a model of ``layers`` blocks."""
        return layers if self.block and self.layer is None else 1

    @property
    def kind(self) -> str:
        """The last part of the name: embedding, head, weight, a, b, values, bias, ..."""
        return self.name.rpartition(".")[2]


def matrix_groups(
    sizes: DecoderConfig, method: Any, plan: Plan, layer: int = 0
) -> list[MatrixGroup]:
    """The four groups of a block, in order: qkv, o, into, down.

    ``layer``: which block; they differ in ranks only, and only with ``method.ranks``.
    """
    h, q, kv = sizes.hidden_size, sizes.q_width, sizes.kv_width
    used, f = sizes.intermediate_size, sizes.padded_intermediate_size
    names = matrix_names(sizes, layer)
    targets = getattr(method, "targets", None)
    t = plan.mesh.tensor_size

    def group(name: str, n: int, rows: tuple[int, ...]) -> MatrixGroup:
        members = {full.rsplit(".", 1)[1] for full in names[name]}
        target = targets is None or members <= set(targets)
        factorized = method.name in FACTORIZED and target
        reads_residual = name in ("qkv", "into")
        shard_columns = plan.sharded_residual or not reads_residual
        shard_rows = plan.sharded_residual or reads_residual
        return MatrixGroup(
            name,
            n,
            rows,
            n // t if shard_columns else n,
            tuple(m // t for m in rows) if shard_rows else rows,
            factorized,
            target,
            tuple((used if m == f else m, used if n == f else n) for m in rows)
            if name in ("into", "down")
            else tuple((m, n) for m in rows),
            tuple(rank_of(method, full) for full in names[name]) if factorized else (),
        )

    return [
        group("qkv", h, (q, kv, kv)),
        group("o", q, (h,)),
        group("into", h, (f,) * len(names["into"])),
        group("down", f, (h,)),
    ]


def different_blocks(sizes: DecoderConfig, method: Any) -> dict[int, int]:
    """Blocks with which all others agree in the ranks of their matrices, and how many each is for.

    Neighbours are compared, so blocks that alternate are all there.
    """
    if not has_ranks(method):
        return {0: sizes.num_layers}
    ranks = [
        [rank_of(method, full) for names in matrix_names(sizes, layer).values() for full in names]
        for layer in range(sizes.num_layers)
    ]
    found: dict[int, int] = {}
    first = 0
    for layer, own in enumerate(ranks):
        first = first if own == ranks[first] else layer
        found[first] = found.get(first, 0) + 1
    return found


def stored_tensors(sizes: DecoderConfig, method: Any, plan: Plan = SINGLE) -> list[Stored]:
    """Every tensor that one tensor-parallel rank stores, before ZeRO partitions them.

    Raises:
        UserError: a plan that does not fit the model.
    """
    check_plan(sizes, method, plan)
    check_names(sizes, method)
    h, rows = sizes.hidden_size, sizes.padded_vocab_size // plan.mesh.tensor_size
    norm = h // plan.mesh.tensor_size if plan.sharded_residual else h
    tensors = [Stored("embedding", rows * h, "matrices")]
    if sizes.position_rows:
        tensors.append(Stored("positions", sizes.position_rows * h, "matrices"))
    vectors = ("", ".bias") if sizes.norm == "layernorm" else ("",)
    for name in ("attention_norm", "mlp_norm"):
        tensors += [Stored(f"{name}{v}", norm, "vectors", block=True) for v in vectors]
    t = plan.mesh.tensor_size if sizes.qk_norm == "full" else 1
    for name, width in zip(("q_norm", "k_norm"), sizes.qk_norm_widths, strict=False):
        tensors.append(Stored(name, width // t, "vectors", block=True))
    tensors += [Stored(f"norm{v}", h, "vectors") for v in vectors]
    if not sizes.tie_embeddings:
        tensors.append(Stored("head", rows * h, "matrices"))
    for layer in _unlike_layers(sizes, method):
        for group in matrix_groups(sizes, method, plan, layer):
            found = _stored_of_group(group, method, plan)
            only = layer if has_ranks(method) else None
            tensors += [replace(tensor, layer=only) for tensor in found]
    for group in matrix_groups(sizes, method, plan):
        if sizes.attention_bias if group.name == "qkv" else sizes.output_bias:
            bias = sum(group.local_rows)
            tensors.append(Stored(f"{group.name}.bias", bias, "vectors", block=True))
    return tensors


def _unlike_layers(sizes: DecoderConfig, method: Any) -> range:
    """The layers to look at: all of them if their ranks may differ, else the first."""
    return range(sizes.num_layers if has_ranks(method) else 1)


def _stored_of_group(group: MatrixGroup, method: Any, plan: Plan) -> Iterator[Stored]:
    dense = group.local_n * sum(group.local_rows)
    matrices = tuple(zip(group.local_rows, (group.local_n,) * len(group.rows), strict=True))
    if not group.factorized:
        kind = "targets" if group.target else "matrices"
        yield Stored(f"{group.name}.weight", dense, kind, True, matrices)
        return
    for r, members in group.by_rank():
        rows = [group.local_rows[index] for index in members]
        a, b = len(members) * r * group.local_n, sum(rows) * r
        factors = ((r, group.local_n),) * len(members), tuple((m, r) for m in rows)
        yield Stored(f"{group.name}.a", a, "factors", True, factors[0])
        yield Stored(f"{group.name}.b", b, "factors", True, factors[1])
        if method.name in DENSE_INSIDE:
            yield Stored(f"{group.name}.weight", group.local_n * sum(rows), "frozen", True)
        if method.name == "sltrain":
            used = [group.used[index] for index in members]
            # Indices are drawn over the whole matrix; a rank holds its share of them on average.
            entries = sum(int(method.density * m * n) for m, n in used) / plan.mesh.tensor_size
            yield Stored(f"{group.name}.values", math.ceil(entries), "matrices", True)
            yield Stored(f"{group.name}.support", math.ceil(entries), "indices", True)


def piece_of(tensor: Stored) -> str:
    """The piece of the decoder (models.drawing) that a tensor belongs to."""
    return "block" if tensor.block else tensor.name.partition(".")[0]


def in_one_piece(tensors: Iterable[Stored]) -> int:
    """Elements of these tensors of one piece; of blocks, of the largest."""
    alike = 0
    of_layer: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layer is None:
            alike += tensor.numel
        else:
            of_layer[tensor.layer] = of_layer.get(tensor.layer, 0) + tensor.numel
    return alike + max(of_layer.values(), default=0)


def drawing_bytes(sizes: DecoderConfig, method: Any, plan: Plan = SINGLE) -> dict[str, int]:
    """Bytes of the float32 numbers that exist at one time while a piece is drawn, by piece.

    Whole matrices on every tensor-parallel rank, beside the parameters themselves.
    """
    h, table = sizes.hidden_size, 4 * sizes.vocab_size * sizes.hidden_size
    block = max(
        _drawn_at_once(group, method, plan)
        for layer in _unlike_layers(sizes, method)
        for group in matrix_groups(sizes, method, plan, layer)
    )
    found = {"embedding": table, "block": block, "norm": 0}
    if sizes.position_rows:
        found["positions"] = 4 * sizes.position_rows * h
    return found if sizes.tie_embeddings else found | {"head": table}


def _drawn_at_once(group: MatrixGroup, method: Any, plan: Plan) -> int:
    dense = 4 * max(m * n for m, n in group.used)
    if not group.factorized or method.name in DENSE_INSIDE:
        return dense
    if method.name != "sltrain":
        return 4 * max(r * (m + n) for r, (m, n) in zip(group.ranks, group.used, strict=True))
    most = 0
    for r, members in group.by_rank():
        # One factor and the values of all matrices; of this rank's values a copy and int64 indices.
        entries = sum(int(method.density * math.prod(group.used[index])) for index in members)
        mine = math.ceil(entries / plan.mesh.tensor_size)
        most = max(most, 4 * r * group.used[0][1] + 4 * entries + 12 * mine)
    return most


def parameter_counts(sizes: DecoderConfig, method: Any) -> dict[str, int]:
    """Parameters of the whole model by kind, without padding; a tied head is in the embedding.

    ``factors`` and SLTrain's ``sparse values``, ``matrices`` stored whole, LoRA's ``frozen
    matrices``. Kinds of which a model has none do not appear.
    """
    h, layers = sizes.hidden_size, sizes.num_layers
    counts = {"embedding": sizes.vocab_size * h}
    counts["positions"] = sizes.position_rows * h
    counts["head"] = 0 if sizes.tie_embeddings else sizes.vocab_size * h
    kinds = {"factors": 0, "sparse values": 0, "frozen matrices": 0, "matrices": 0}
    biases = 0
    unlike = _unlike_layers(sizes, method)
    for group in (g for layer in unlike for g in matrix_groups(sizes, method, SINGLE, layer)):
        dense = sum(m * n for m, n in group.used)
        if group.factorized:
            used = zip(group.ranks, group.used, strict=True)
            kinds["factors"] += sum(r * (m + n) for r, (m, n) in used)
            if method.name in DENSE_INSIDE:
                kinds["frozen matrices"] += dense
            if method.name == "sltrain":
                kinds["sparse values"] += sum(int(method.density * m * n) for m, n in group.used)
        else:
            kinds["matrices"] += dense
        if sizes.attention_bias if group.name == "qkv" else sizes.output_bias:
            biases += sum(m for m, _ in group.used)
    alike = layers // len(unlike)
    counts |= {kind: alike * number for kind, number in kinds.items()}
    vectors = 1 if sizes.norm == "rmsnorm" else 2  # LayerNorm has a bias
    norms = (2 * layers + 1) * vectors * h + layers * sum(sizes.qk_norm_widths)
    counts["norms, biases"] = norms + alike * biases
    return {kind: number for kind, number in counts.items() if number}


def count(tensors: list[Stored], layers: int, *groups: str) -> int:
    """Elements of all tensors of these groups, blocks counted ``layers`` times."""
    return sum(t.numel * t.times(layers) for t in tensors if t.group in groups)


TRAINED = ("factors", "targets", "matrices", "vectors")
"""Groups that have gradients."""
