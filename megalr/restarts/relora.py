"""ReLoRA: merge the factors into the frozen matrix, draw new factors, prune their moments.

arXiv 2307.05695. Under ZeRO 1 and 2 every rank holds the frozen matrices whole (they have no
optimizer state) and its fragments of the factors' masters and moments. A merge computes on the
weights that the model uses, so the network's function changes by the rounding of W0 only, and
writes the new factors into the fragments.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.engine.state import EngineState
from megalr.errors import UserError
from megalr.layers.factors import named_generator
from megalr.layers.lora import LoRALinear
from megalr.restarts.refactorize import sum_over
from megalr.sharding.tensor_shard import shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class MergeReport:
    """A merge, a reset, or both after an update; the fields of the ``merge`` event."""

    merged: bool
    matrices: int
    reset: bool
    fraction_reset: float
    merge_seconds: float

    def metrics(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)


class Relora:
    """Merges and resets of one run; create it on all ranks after the engine.

    Args:
        method: the section ``method`` (ReloraMethod).
        engine: the engine, on every rank.
        layers: the model's LoRA layers.
        seed: seed of the run; gives the new factors and the random resets.

    Raises:
        UserError: ZeRO stage 3, or an optimizer other than AdamW.
    """

    def __init__(self, method: Any, engine: Any, layers: Sequence[LoRALinear], seed: int) -> None:
        self.method = method
        self.layers = layers
        self.seed = seed
        self.seconds = 0.0
        self.reset_every = method.reset_every or method.merge_every
        self.state = EngineState(engine)
        if self.state.wrapper.splits_weights:
            raise UserError(
                "method.name=relora with ZeRO stage 3: the frozen matrices are cut over ranks and "
                "cannot be merged in place; use stage 1 or 2"
            )
        if not isinstance(self.state.base, torch.optim.AdamW):
            raise UserError(
                f"method.name=relora resets AdamW's moments; optimizer.name must be adamw, got "
                f"{type(self.state.base).__name__}"
            )

    def due(self, update: int) -> bool:
        """Whether a merge or a reset is due after ``update`` updates."""
        return any(self._due(update))

    def _due(self, update: int) -> tuple[bool, bool]:
        """Whether a merge is due, and whether a reset."""
        resetting = self.method.reset != "none" and _first_of_period(update, self.reset_every)
        return _first_of_period(update, self.method.merge_every), resetting

    @torch.no_grad()
    def after_update(self, update: int) -> MergeReport | None:
        """Merge and reset if due after ``update`` updates; every rank calls it then."""
        merging, resetting = self._due(update)
        if not merging and not resetting:
            return None
        started = time.perf_counter()
        if merging:
            self._merge(update)
        fraction = self._prune(update) if resetting else 0.0
        if self.state.device.type == "cuda":
            torch.cuda.synchronize(self.state.device)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        matrices = sum(len(layer.sizes) for layer in self.layers) if merging else 0
        return MergeReport(merging, matrices, resetting, fraction, seconds)

    def _merge(self, update: int) -> None:
        group = self.state.process_group
        for layer in self.layers:
            layer.merge_()
            # Equal devices compute the same; different ones may round differently.
            dist.broadcast(layer.weight, dist.get_global_rank(group, 0), group=group)
            self._write(layer.a, layer.draw_a(self.seed, f"@{update}"))
            self._write(layer.b, torch.zeros(layer.b.shape, device=layer.b.device))
        self.state.refresh_weights()

    def _write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Put this rank's part of ``values`` into its fragment of the master."""
        master = self.state.master(parameter)
        if master is not None:
            start, stop = self.state.held(parameter)
            master.copy_(values.view(-1)[start:stop])

    def _prune(self, update: int) -> float:
        """Zero the chosen share of the factors' moments; the share zeroed over all ranks."""
        zeroed = total = 0
        for layer in self.layers:
            for parameter in (layer.a, layer.b):
                start, stop = self.state.held(parameter)
                fragments = self.state.states(parameter)
                counted = self.state.counts(parameter)
                for name, keep in self._kept(parameter, fragments.get("exp_avg"), update):
                    fragment = fragments.get(name)
                    if fragment is not None:
                        here = keep[start:stop]
                        fragment.mul_(here.to(fragment.device))
                        zeroed += counted * int((~here).sum())
                        total += counted * fragment.numel()
        self.state.relink()  # so that the engine's own getters read the same moments
        zeroed, total = sum_over([zeroed, total], self.state, over_tensor_ranks=True)
        return zeroed / total if total else 0.0

    def _kept(
        self, parameter: nn.Parameter, first: Tensor | None, update: int
    ) -> Iterator[tuple[str, Tensor]]:
        """For each moment a mask over the whole flattened parameter: the entries that stay.

        The masks are the same on all ranks. ``first``: this rank's fragment of the first moment.
        Random masks of the two moments are independent, as published. By magnitude the first moment
        decides for both: in the update after a merge B = 0, so the gradient of A is zero, and an
        entry that kept its first moment only would move by lr * exp_avg / eps.
        """
        for name in MOMENTS if self.method.reset == "random" else ():
            yield name, self._random_mask(parameter, f"{name}@{update}")
        if self.method.reset == "magnitude":
            keep = self._largest(parameter, first)
            for name in MOMENTS:
                yield name, keep

    def _random_mask(self, parameter: nn.Parameter, key: str) -> Tensor:
        shard, device = shard_of(parameter), self.state.device
        shape = shard.full_shape if shard else (self.state.numel(parameter),)
        generator = named_generator(self.seed, f"{self.state.name(parameter)}.{key}", device)
        draw = torch.empty(shape, device=device).uniform_(generator=generator)
        return (shard.take(draw) if shard else draw).view(-1) >= self.method.reset_fraction

    def _largest(self, parameter: nn.Parameter, fragment: Tensor | None) -> Tensor:
        """Mask of the entries above the quantile ``reset_fraction`` of their matrix."""
        size, device = self.state.numel(parameter), self.state.device
        whole = torch.zeros(size, device=device)
        if fragment is not None:
            start, stop = self.state.held(parameter)
            whole[start:stop] = fragment.to(device).abs()
        if not self.state.replicated:
            dist.all_reduce(whole, group=self.state.process_group)
        keep = torch.empty(size, dtype=torch.bool, device=device)
        columns = self.state.shape(parameter)[1]
        for _, first, last in parameter.row_blocks:  # type: ignore[attr-defined]
            block = whole[first * columns : last * columns]
            matrix = self._of_all_parts(parameter, block)
            # kthvalue: torch.quantile refuses more than 16 M elements.
            rank = round(self.method.reset_fraction * (matrix.numel() - 1)) + 1
            keep[first * columns : last * columns] = block > matrix.kthvalue(rank).values
        return keep

    def _of_all_parts(self, parameter: nn.Parameter, block: Tensor) -> Tensor:
        """Elements of a whole matrix, in any order, from the parts of all tensor-parallel ranks."""
        group = self.state.tensor_group
        if group is None or shard_of(parameter) is None:
            return block
        whole = block.new_empty(dist.get_world_size(group) * block.numel())
        dist.all_gather_into_tensor(whole, block.contiguous(), group=group)
        return whole


def _first_of_period(update: int, period: int) -> bool:
    """Whether ``update`` (one-based) is the first of a later period."""
    return update > period and update % period == 1
