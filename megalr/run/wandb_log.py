"""A run's numbers in Weights & Biases: one run there for all starts of a run here."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from megalr.errors import UserError
from megalr.files import replace_file

ID_FILE = "wandb/run_id"
"""In the run's folder; holds the id of its run at Weights & Biases."""


class WandbLog:
    """Sends numbers by update.

    Weights & Biases drops what is logged for a step before its newest. So ``update`` is a logged
    number that serves as the horizontal axis, and may go back after a rollback or a resume.

    Args:
        project: project of the run.
        folder: the run's folder.
        config: resolved configuration.

    Raises:
        UserError: wandb is not installed or does not start.
        OSError: the folder cannot be written.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"log.wandb_project is {project!r} but wandb is not installed: "
                "pip install -e '.[wandb]', or leave the key out"
            ) from error
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder / ID_FILE),
                resume="allow",
                dir=str(folder),
                config=config,
                allow_val_change=True,
            )
        except wandb.Error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"Weights & Biases did not start ({reason}): run `wandb login`, set "
                "WANDB_MODE=offline, or leave log.wandb_project out; if the run was deleted there, "
                f"remove {folder / ID_FILE}"
            ) from error
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def write(self, update: int, numbers: dict[str, float]) -> None:
        """Log the numbers of an update, by name."""
        self._run.log({"update": update, **numbers})

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


def _run_id(file: Path) -> str:
    """The id in the file, which is made if it does not exist."""
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        replace_file(file, uuid.uuid4().hex[:16].encode())
    return file.read_text(encoding="utf-8").strip()
