"""EleutherAI's lm-evaluation-harness on an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megalr.distributed.launcher_env import number_of_processes
from megalr.errors import UserError


def run_tasks(
    model: Path,
    tasks: Sequence[str],
    batch_size: int,
    few_shot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Run lm-eval tasks on a transformers folder, in one process.

    Args:
        model: the folder, with its tokenizer.
        tasks: task names.
        batch_size: sequences per forward pass.
        few_shot: examples before each question; None: the task's default.
        limit: questions per task; None: all.
        include_path: folder with further tasks.

    Returns:
        The metrics of each task, as plain values.

    Raises:
        UserError: several processes, lm-eval is not installed, an unknown task, or a model or data
            set that it cannot load.
    """
    if number_of_processes() > 1:
        raise UserError("--tasks runs on one process: start it with plain python")
    try:
        import lm_eval
        import lm_eval.models.huggingface
        from lm_eval.tasks import TaskManager

        import megalr.hf.auto  # noqa: F401  (registers the classes of factorized folders)
    except ImportError as error:
        raise UserError(
            "--tasks needs lm-eval, which is not installed: pip install -e '.[lm_eval]'"
        ) from error
    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"--tasks {', '.join(unknown)}: lm-eval knows no such task; `lm-eval ls tasks` lists "
            "them, --include_path adds a folder"
        )
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "trust_remote_code": False},
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            batch_size=batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            task_manager=manager,
        )
    except (OSError, ValueError, ConnectionError) as error:  # no network, no such data set, ...
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(f"lm-eval could not run {', '.join(tasks)} on {model}: {reason}") from error
    return dict(found["results"])
