"""megalr in Hugging Face's Trainer: restarts as a callback (docs/library.md)."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from megalr.errors import UserError
from megalr.library.restarts import Restarts
from megalr.restarts.report import RestartReport

__all__ = ["RestartsCallback"]


class RestartsCallback(TrainerCallback, ExportableState):
    """Restarts after the updates of a Trainer where they are due: ``callbacks=[...]``.

    A resumed training continues as if it had not been interrupted: restarts depend on the number
    of updates, which the Trainer keeps, and come before the checkpoint of the same update; its
    ``trainer_state.json`` has the last reset by the imbalance.

    Args:
        every: updates (``global_step``) between two restarts.
        **settings: those of :class:`megalr.Restarts`. ``total_updates`` is the Trainer's
            ``max_steps`` if not given.

    Raises:
        TypeError: an unknown setting.
        UserError: when training starts, for what :class:`megalr.Restarts` refuses, and under
            DeepSpeed (``megalr train`` has restarts there).

    Attributes:
        reports: one for each restart since training started.
        triggered_reset: updates done at the last reset by the imbalance; None before one.
    """

    def __init__(self, every: int | None = None, **settings: Any) -> None:
        inspect.signature(Restarts).bind(None, None, every, **settings)
        self.settings = {"every": every, **settings}
        self.reports: list[RestartReport] = []
        self.triggered_reset: int | None = None
        self._restarts: Restarts | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer saves, and makes this again from; plain values."""
        args = {key: value for key, value in self.settings.items() if key != "process_group"}
        return {"args": args, "attributes": {"triggered_reset": self.triggered_reset}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Check model and optimizer, and continue at the Trainer's update."""
        if args.deepspeed is not None:
            raise UserError(
                "RestartsCallback: the Trainer's optimizer is inside of DeepSpeed: train with DDP "
                "or FSDP2, or with `megalr train`"
            )
        settings = {"total_updates": state.max_steps, **self.settings}
        copies = args.parallel_mode == ParallelMode.DISTRIBUTED and not args.fsdp
        if copies and "process_group" not in settings:
            settings["process_group"] = dist.group.WORLD
        self.on_train_end(args, state, control)
        self.reports = []
        self._restarts = Restarts(parts["model"], parts["optimizer"], **settings)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self._restarts.load_state_dict({"updates": state.global_step, **saved})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Restart if one is due after this update."""
        assert self._restarts is not None  # the Trainer calls on_train_begin first
        report = self._restarts.step()
        if report is not None:
            self.reports.append(report)
        self.triggered_reset = self._restarts.state_dict()["triggered_reset"]

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Let go of the optimizer."""
        self.triggered_reset = None
        if self._restarts is not None:
            self._restarts.close()
            self._restarts = None
