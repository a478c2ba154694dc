"""A run's numbers in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = "tensorboard"
"""In the run's folder."""
TRAIN, VALIDATION = "train", "validation"
"""Runs of TensorBoard in it; a further validation set has one named ``validation_NAME``."""

FLUSH_SECONDS = 20
"""How late TensorBoard may see a number."""

TAGS = {
    "step": {
        "loss": "loss",
        "learning_rate": "lr",
        "gradient_norm": "optimizer/gradient_norm",
        "tokens_per_second": "speed/tokens_per_second",
        "step_seconds": "speed/step_seconds",
        "data_seconds": "speed/data_seconds",
        "mfu": "speed/mfu",
        "peak_memory_gib": "speed/peak_memory_gib",
    },
    "eval": {"loss": "loss", "perplexity": "perplexity"},
    "eval_further": {"loss": "loss", "perplexity": "perplexity"},
    "restart": {
        "refactorize_seconds": "restart/refactorize_seconds",
        "reset_seconds": "restart/reset_seconds",
        "imbalance": "restart/imbalance",
        "dead_directions": "restart/dead_directions",
        "matrices_by_qr": "restart/matrices_by_qr",
    },
}
"""Tag of each field that is plotted, by event.

TensorBoard sorts cards by tag: loss and lr come first. Runs with one tag share its card: training
and validation are curves of the card ``loss``. Fields that do not change are text.
"""


class TensorBoardLog:
    """Writes curves, the configuration and the facts of a start.

    TensorBoard shows a step once: what a resume or a rollback went back over is purged.

    Args:
        folder: the run's folder.
        config: resolved configuration.

    Raises:
        OSError: the folder cannot be written; also from the methods.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder, self._config = folder / FOLDER, config
        self._writers: dict[str, Any] = {}
        self._from = 0
        self._folder.mkdir(exist_ok=True)

    def write(self, event: str, update: int, numbers: dict[str, Any]) -> None:
        """Write an event, if it is one that TensorBoard is to show."""
        if event in ("start", "rollback"):
            self.close()
            self._from = numbers.get("to_update", update)
            for path in self._folder.iterdir():
                if path.is_dir():
                    self._writer(path.name)  # purges what this run of TensorBoard has of later
        if event == "start":
            self._texts(update, numbers)
        run = TRAIN
        if event.startswith("eval"):
            run = f"{VALIDATION}_{numbers['validation']}" if event != "eval" else VALIDATION
        for field, tag in TAGS.get(event, {}).items():
            value = numbers.get(field)
            if isinstance(value, int | float):  # mfu may be n/a
                self._writer(run).add_scalar(tag, value, update)

    def close(self) -> None:
        """Flush and close the files; the next event opens new ones."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _texts(self, update: int, facts: dict[str, Any]) -> None:
        """The configuration as YAML and the facts as a table."""
        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
        rows = [f"| {k} | {v} |" for k, v in facts.items() if not isinstance(v, dict)]
        rows += [f"| {k} | {v} |" for k, v in facts.get("versions", {}).items()]
        table = "\n".join(["| fact | value |", "|---|---|", *rows])
        writer = self._writer(TRAIN)
        writer.add_text("configuration", f"```yaml\n{text}```", update)
        writer.add_text("facts", table, update)

    def _writer(self, run: str) -> Any:
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            path = str(self._folder / run)
            first = self._from + 1
            self._writers[run] = SummaryWriter(path, purge_step=first, flush_secs=FLUSH_SECONDS)
        return self._writers[run]
