"""What is to be done after which update."""

from __future__ import annotations

from megalr.config.schema import RunConfig
from megalr.restarts.controller import Restarts
from megalr.restarts.relora import Relora


class Due:
    """Answers what is due after so many updates; a function of the configuration alone.

    Args:
        config: the run.
        evaluates: whether there is a validation set.
        restarts: refactorization and momentum reset.
        relora: ReLoRA's merges; None for other methods.
    """

    def __init__(
        self, config: RunConfig, evaluates: bool, restarts: Restarts, relora: Relora | None
    ) -> None:
        self._last = config.train.updates
        self._log = config.log.every
        self._evaluation = config.evaluation.every
        self._checkpoint = config.checkpoint.every
        self._evaluates = evaluates
        self._restarts = restarts
        self._relora = relora

    def log(self, update: int) -> bool:
        """Whether to report the updates since the last report."""
        return update == self._last or _reached(update, self._log)

    def evaluation(self, update: int) -> bool:
        """Whether to evaluate."""
        reached = update == self._last or _reached(update, self._evaluation)
        return self._evaluates and reached

    def checkpoint(self, update: int) -> bool:
        """Whether to save."""
        return update == self._last or _reached(update, self._checkpoint)

    def between(self, update: int) -> bool:
        """Whether anything but a report must come before the next update is launched."""
        return (
            self.evaluation(update)
            or self.checkpoint(update)
            or self._restarts.due(update)
            or (self._relora is not None and self._relora.due(update))
        )


def _reached(update: int, every: int) -> bool:
    """Whether something with this period is due; a period of 0 never is."""
    return every > 0 and update % every == 0
