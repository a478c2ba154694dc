"""AdamW of many bf16 tensors at memory speed: weights, gradients and both moments in bf16.

torch's fused AdamW moves the same 14 bytes a parameter, in one launch for some tens of tensors, and
took nearly twice the time of the memory traffic on an H200. :class:`AdamW` is torch's with another
``step``: one kernel over all tensors of a parameter group, found by a table of addresses. Plain
twin: torch's own step, which it takes for everything that the kernel does not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from megalr.kernels import HAS_TRITON

ALIGNMENT = 16
"""Bytes that a thread loads at once; every tensor must begin on a multiple."""

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Weight, gradient, first moment, second moment, step."""


def adamw_runs_on(device: torch.device) -> bool:
    """Whether the kernel runs there: a CUDA device, or the CPU under Triton's interpreter.

    The interpreter, which follows the addresses itself, can read no others.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return HAS_TRITON and device.type == ("cpu" if interpreted else "cuda")


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with a faster step for bf16; arguments, state and results are the same.

    Arithmetic is float32 and every result is rounded once to bf16, as in torch's kernel, whose
    operations of float32 (torch 2.6: partly float64) differ from these in the last bits.
    ``found_inf`` and ``grad_scale`` are read from the optimizer as torch does; unlike torch's
    kernel this one does not store the gradients that it has divided. The host never waits for the
    device.

    The class has the name of torch's because checkpoints record it, and the layout is the same.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        """``options``: those of torch.optim.AdamW but ``fused``, which is True."""
        super().__init__(params, fused=True, **options)
        self._tables: dict[int, Any] = {}  # by the number of the group, see adamw_triton

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and loaded checkpoints, whose tensors lie elsewhere."""
        super().__setstate__(state)
        self._tables = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; by torch's step if there is a closure or a group that does not fit."""
        rows = None if closure is not None else _rows(self)
        if rows is None:
            return _torch_step(self, closure)
        from megalr.kernels.adamw_triton import make_tables, update_

        for index, (group, tensors) in enumerate(zip(self.param_groups, rows, strict=True)):
            if not tensors:
                continue
            addresses = [tensor.data_ptr() for row in tensors for tensor in row]
            tables = self._tables.get(index)
            if tables is None or tables.addresses != addresses:
                sizes = [row[0].numel() for row in tensors]
                tables = make_tables(addresses, sizes, tensors[0][0].device, tables)
                self._tables[index] = tables
            device = tables.table.device
            scale, bad = (_on(device, getattr(self, n, None)) for n in ("grad_scale", "found_inf"))
            update_(tables, group, scale, bad)
        return None


def _on(device: torch.device, number: torch.Tensor | None) -> torch.Tensor | None:
    if number is None:
        return None
    return number.to(device=device, dtype=torch.float32, non_blocking=True)


def _torch_step(optimizer: AdamW, closure: Callable[[], Any] | None) -> Any:
    step: Any = torch.optim.AdamW.step
    if getattr(step, "hooked", False):
        # Some other AdamW was made and torch put its hooks around that class's step. They are
        # around ours as well and are to run once.
        step = step.__wrapped__
    return step(optimizer, closure)


def _rows(optimizer: AdamW) -> list[list[Row]] | None:
    """For each group its tensors that have a gradient; None if the kernel cannot take them all."""
    found = []
    for group in optimizer.param_groups:
        rows = []
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = optimizer.state.get(weight)
            if not state:
                return None  # before the first update: torch makes the moments
            rows.append((weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        if rows and not (_options_fit(group) and _tensors_fit(rows)):
            return None
        found.append(rows)
    return found


def _options_fit(group: dict[str, Any]) -> bool:
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return (
        all(isinstance(number, int | float) for number in numbers)
        and bool(group["fused"])
        and not group["amsgrad"]
        and not group["maximize"]
    )


def _tensors_fit(rows: list[Row]) -> bool:
    device = rows[0][0].device
    return adamw_runs_on(device) and all(_row_fits(row, device) for row in rows)


def _row_fits(row: Row, device: torch.device) -> bool:
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
