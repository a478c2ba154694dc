"""The line of each event on the terminal: what happened, in at most 80 columns.

docs/metrics.md lists the events and their fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megalr.run.units import (
    WIDTH,
    binary_size,
    clip,
    clock,
    compact,
    four_digits,
    loss_text,
    scientific,
    took,
)

Numbers = dict[str, Any]


def event_line(event: str, update: int, total: int, numbers: Numbers) -> str:
    """One line about an event other than ``start``, ``signal`` and ``end``.

    ``step 60/240  loss 6.670  lr 1.4e-3  4.10k tok/s    0.6 GiB  eta    0:48``

    Args:
        event: its name.
        update: updates done.
        total: updates of the whole run.
        numbers: the event's fields.
    """
    digits = len(str(total))
    width = max(len("step /") + 2 * digits, len("checkpoint ") + digits)  # texts begin in a column
    if event == "step":
        return _step(f"step {update:>{digits}}/{total}".ljust(width), numbers)
    head = f"{'eval' if event == 'eval_further' else event} {update}"
    return clip(f"{head:<{width}}  {LINES[event](numbers)}")


def _step(head: str, n: Numbers) -> str:
    """Columns of equal width; memory, lr, speed go first where 80 columns are too few."""
    columns = {
        "loss": lambda v: f"loss {loss_text(v):>6}",
        "learning_rate": lambda v: f"lr {scientific(v):>6}",
        "tokens_per_second": lambda v: f"{compact(float(v)):>5} tok/s",
        "peak_memory_gib": lambda v: f"{v:5.1f} GiB",
        "eta_seconds": lambda v: f"eta {clock(v):>7}",
    }
    shown = {key: text(n[key]) for key, text in columns.items() if key in n}
    for key in ("peak_memory_gib", "learning_rate", "tokens_per_second"):
        if len("  ".join([head, *shown.values()])) > WIDTH:
            shown.pop(key, None)
    return clip("  ".join([head, *shown.values()]))


def _import(n: Numbers) -> str:
    errors = (
        f"relative error {n['relative_error_mean']:.3f} (largest {n['relative_error_max']:.3f})"
    )
    return f"{n['matrices']} matrices, {errors}, {took(n['import_seconds'])}"


def _resume(n: Numbers) -> str:
    parts = [f"read in {took(n['verify_seconds'] + n['load_seconds'])}"]
    parts += ["in another shape"] if n["reshaped"] else []
    parts += [f"{key} {before} -> {now}" for key, before, now in n["allowed"]]
    parts += [f"damaged: {tag}" for tag in n["damaged"]]
    parts += [f"unfinished: {tag}" for tag in n["unfinished"]]
    return ", ".join(parts)


def _fork(n: Numbers) -> str:
    parts = [f"{'weights' if n['state'] == 'weights' else 'state'} of {n['path']}"]
    parts += [f"{key} {source} -> {own}" for key, source, own in n["changed"]]
    return ", ".join(parts)


def _compile(n: Numbers) -> str:
    kernels = n["kernel_seconds"]
    rest = "" if kernels is None else f", and {took(kernels)} for custom kernels"
    return f"torch.compile took {took(n['compile_seconds'])}{rest}"


def _evaluation(n: Numbers) -> str:
    name = f"{n['validation']} " if "validation" in n else ""
    return f"{name}ppl {four_digits(n['perplexity'])} (loss {loss_text(n['loss'])})"


def _restart(n: Numbers) -> str:
    why = {"period": "", "gradient_norm": "gradient norm: "}
    trigger = why.get(n["trigger"], f"imbalance {n.get('imbalance', 0.0):.2g}: ")
    if "skipped_nonfinite" in n:
        return f"{trigger}not done, not finite: {n['skipped_nonfinite']}"
    parts = []
    if n["refactorized"]:
        parts.append(f"refactorized {n['matrices']} pairs in {took(n['refactorize_seconds'])}")
        if n["dead_directions"]:
            parts.append(f"{n['dead_directions']} dead directions")
    if n.get("moments_transported"):
        parts.append("moments carried over")
    if n["reset"]:
        share = n["fraction_reset"]
        parts.append("moments reset" if share == 1 else f"{share:.0%} of moments reset")
    return trigger + ", ".join(parts)


def _merge(n: Numbers) -> str:
    parts = []
    if n["merged"]:
        parts.append(f"merged {n['matrices']} matrices in {took(n['merge_seconds'])}")
    if n["reset"]:
        parts.append(f"{n['fraction_reset']:.0%} of moments reset")
    return ", ".join(parts)


def _checkpoint(n: Numbers) -> str:
    trouble = n["delete_error"]
    rest = f", older ones not deleted: {trouble}" if trouble else ""
    return f"{n['path']}, {binary_size(n['bytes'])} in {took(n['save_seconds'])}{rest}"


def _skip(n: Numbers) -> str:
    why = "spike" if n["reason"] == "spike" else "not finite"
    row, skipped = n["skipped_in_row"], n["skipped"]
    return f"{why}: update skipped (batch {n['batch']}; {row} in a row, {skipped} in all)"


def _spike(n: Numbers) -> str:
    value = f"{n['of'].replace('_', ' ')} {four_digits(n['value'])}"
    above = f"{n['deviations']:.1f} deviations above {four_digits(n['mean'])}"
    return f"{value}, {above} (batch {n['batch']}): {n['action']}"


def _reset(n: Numbers) -> str:
    return f"{n['fraction_reset']:.0%} of moments, after a {n['reason']}"


def _rollback(n: Numbers) -> str:
    return f"to update {n['to_update']}, {n['batches_left_out']} batches dropped: {n['reason']}"


LINES: dict[str, Callable[[Numbers], str]] = {
    "import": _import,
    "resume": _resume,
    "fork": _fork,
    "compile": _compile,
    "eval": _evaluation,
    "eval_further": _evaluation,
    "restart": _restart,
    "merge": _merge,
    "checkpoint": _checkpoint,
    "skip": _skip,
    "spike": _spike,
    "reset": _reset,
    "rollback": _rollback,
}
"""Text by event, without its name and update."""
