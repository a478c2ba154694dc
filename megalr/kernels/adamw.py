"""AdamW (arXiv 1711.05101) of many bf16 tensors at memory speed: weights, gradients, moments.

torch's fused AdamW moves the same 14 bytes per parameter, in one launch for some tens of tensors,
and took nearly twice the time of the memory traffic on an H200. :class:`AdamW` is torch's with
another ``step``: one kernel over all tensors of a parameter group, found by a table of addresses.
PyTorch reference: torch's own step, which also handles all cases that the kernel does not support.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megalr.kernels import HAS_TRITON
from megalr.kernels.stochastic_rounding import Run, StochasticRounding, adamw_

ALIGNMENT = 16
"""Bytes that a thread loads at once; every tensor must start at a multiple of it."""

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Weight, gradient, first moment, second moment, step."""


def adamw_runs_on(device: torch.device) -> bool:
    """Whether the kernel runs there: a CUDA device, or the CPU under Triton's interpreter.

    The interpreter dereferences the addresses itself, so it can read CPU memory only.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return HAS_TRITON and device.type == ("cpu" if interpreted else "cuda")


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with a faster step for bf16; arguments, state and results are the same.

    Arithmetic is float32 and every result is rounded once to bf16, as in torch's kernel, whose
    float32 operations (torch 2.6: partly float64) differ from these in the last bits. ``found_inf``
    and ``grad_scale`` are read from the optimizer as torch does. Unlike torch's kernel this one
    does not store the divided gradients. The host never waits for the device.

    With ``rounding`` weights, moments or both are rounded to bf16 stochastically, by the kernel or
    by its PyTorch reference (kernels.stochastic_rounding), which give the same bits. Groups then
    have an option ``update``: the number of the update, from 1 on, which is set before every step.

    The class has the name of torch's because checkpoints record it, and the state is the same.
    """

    def __init__(
        self,
        params: Any,
        *,
        rounding: StochasticRounding | None = None,
        kernel: bool = True,
        **options: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: as torch's.
            rounding: what is rounded stochastically; None: nothing.
            kernel: whether the kernel may be used.
            options: those of torch.optim.AdamW except ``fused``, which is True.
        """
        super().__init__(params, fused=True, **options)
        self.rounding, self.kernel = rounding, kernel
        self._tables: dict[int, Any] = {}  # by index of the group, see adamw_triton
        self._runs: dict[torch.Tensor, tuple[Run, ...]] = {}
        if rounding is not None:
            first = 0
            for group in self.param_groups:
                group["update"] = 0
                for weight in group["params"]:
                    self._runs[weight] = ((0, first, weight.numel()),)
                    first += weight.numel()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of."""
        own = {name: vars(self)[name] for name in ("rounding", "kernel", "_runs")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Drop the tables: tensors of copies and loaded checkpoints are at other addresses."""
        super().__setstate__(state)
        self._tables = {}

    def attach_runs(self, runs: Mapping[torch.Tensor, tuple[Run, ...]]) -> None:
        """Set the numbers of the elements of the tensors that replace those in ``param_groups``."""
        self._runs = dict(runs)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; by torch's step with a closure or for groups the kernel does not support.

        Raises:
            RuntimeError: stochastic rounding without the number of the update, or with a closure.
        """
        if self.rounding is not None:
            if closure is not None or not all(group["update"] for group in self.param_groups):
                raise RuntimeError(
                    "stochastic rounding takes no closure, and the number of the update, from 1 "
                    "on, as option update of every group"
                )
            _create_state(self)
        rows = None if closure is not None or not self.kernel else _rows(self)
        if rows is not None and all(self._are_whole(tensors) for tensors in rows):
            self._step_by_kernel(rows)
        elif self.rounding is None:
            return _torch_step(self, closure)
        else:
            self._step_by_reference(self.rounding)
        return None

    def _are_whole(self, rows: list[Row]) -> bool:
        """Whether the elements of each tensor have consecutive numbers, if they need any."""
        if self.rounding is None:
            return True
        runs = [self._runs[row[0]] for row in rows]
        return all(len(run) == 1 and run[0][0] == 0 for run in runs)

    def _step_by_kernel(self, rows: list[list[Row]]) -> None:
        from megalr.kernels.adamw_triton import make_tables, update_

        for index, (group, tensors) in enumerate(zip(self.param_groups, rows, strict=True)):
            if not tensors:
                continue
            addresses = [tensor.data_ptr() for row in tensors for tensor in row]
            tables = self._tables.get(index)
            if tables is None or tables.addresses != addresses:
                sizes = [row[0].numel() for row in tensors]
                numbers = [self._runs[row[0]][0][1] for row in tensors] if self._runs else None
                tables = make_tables(addresses, sizes, tensors[0][0].device, tables, numbers)
                self._tables[index] = tables
            scale, found_inf = self._scale_and_found_inf(tables.table.device)
            update_(tables, group, scale, found_inf, self.rounding)

    def _step_by_reference(self, rounding: StochasticRounding) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    tensors = (weight.detach(), weight.grad, *moments, state["step"])
                    extra = self._scale_and_found_inf(weight.device)
                    adamw_(tensors, group, rounding, self._runs[weight], *extra)

    def _scale_and_found_inf(self, device: torch.device) -> Any:
        return (_on(device, getattr(self, name, None)) for name in ("grad_scale", "found_inf"))


def _create_state(optimizer: AdamW) -> None:
    """Moments and steps of zero where there are none, as torch's first step makes them."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and not optimizer.state.get(weight):
                state = optimizer.state[weight]
                state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)


def _on(device: torch.device, number: torch.Tensor | None) -> torch.Tensor | None:
    if number is None:
        return None
    return number.to(device=device, dtype=torch.float32, non_blocking=True)


def _torch_step(optimizer: AdamW, closure: Callable[[], Any] | None) -> Any:
    step: Any = torch.optim.AdamW.step
    if getattr(step, "hooked", False):
        # Constructing a torch AdamW wraps that class's step in hooks. This class's step has the
        # same hooks, which must run once.
        step = step.__wrapped__
    return step(optimizer, closure)


def _rows(optimizer: AdamW) -> list[list[Row]] | None:
    """For each group its tensors with a gradient; None if the kernel does not support them all."""
    groups = []
    for group in optimizer.param_groups:
        rows = []
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = optimizer.state.get(weight)
            if not state:
                return None  # before the first update: torch allocates the moments
            rows.append((weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        if rows and not (_supports_options(group) and _supports_tensors(rows)):
            return None
        groups.append(rows)
    return groups


def _supports_options(group: dict[str, Any]) -> bool:
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return (
        all(isinstance(number, int | float) for number in numbers)
        and bool(group["fused"])
        and not group["amsgrad"]
        and not group["maximize"]
    )


def _supports_tensors(rows: list[Row]) -> bool:
    device = rows[0][0].device
    return adamw_runs_on(device) and all(_supports_row(row, device) for row in rows)


def _supports_row(row: Row, device: torch.device) -> bool:
    *numbers, step = row
    return (
        step.dtype == torch.float32
        and step.numel() == 1
        and step.device == device
        and all(
            tensor.dtype == torch.bfloat16
            and tensor.layout == torch.strided
            and tensor.device == device
            and tensor.numel() == numbers[0].numel()
            and tensor.is_contiguous()
            and tensor.data_ptr() % ALIGNMENT == 0
            for tensor in numbers
        )
    )
