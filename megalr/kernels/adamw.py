"""AdamW (arXiv 1711.05101) of many bf16 tensors at memory speed: weights, gradients, moments.

torch's fused AdamW moves the same 14 bytes per parameter, in one launch for some tens of tensors,
and took nearly twice the time of the memory traffic on an H200. :class:`AdamW` is torch's with
another ``step``: one kernel over all tensors of a parameter group, found by a table of addresses.
PyTorch reference: torch's own step, which also handles all cases that the kernel does not support.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from megalr.kernels import HAS_TRITON

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

    The class has the name of torch's because checkpoints record it, and the state is the same.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        """``options``: those of torch.optim.AdamW except ``fused``, which is True."""
        super().__init__(params, fused=True, **options)
        self._tables: dict[int, Any] = {}  # by index of the group, see adamw_triton

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Drop the tables: tensors of copies and loaded checkpoints are at other addresses."""
        super().__setstate__(state)
        self._tables = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; by torch's step with a closure or for groups the kernel does not support."""
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
            scale, found_inf = (
                _on(device, getattr(self, n, None)) for n in ("grad_scale", "found_inf")
            )
            update_(tables, group, scale, found_inf)
        return None


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
