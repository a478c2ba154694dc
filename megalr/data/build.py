"""The data of a run from its configuration: opened, checked, and this rank's batches of them."""

from __future__ import annotations

import torch.distributed as dist

from megalr.config.schema import RunConfig
from megalr.data import (
    EvaluationBatches,
    TokenDataset,
    UpdateLoader,
    check_same_tokenizer,
    check_vocabulary,
    has_validation_split,
    open_training_data,
    open_validation_data,
)
from megalr.distributed.agreement import run_on_all
from megalr.errors import AgreedError
from megalr.tensor_parallel.mesh import Mesh


def open_data(
    config: RunConfig, vocab_size: int | None
) -> tuple[TokenDataset, dict[str, TokenDataset]]:
    """The training data, and the validation sets by name; every rank must call it.

    Without ``data.validation`` there is one set without a name, the validation split of the
    training data, if all sources have one. ``vocab_size``: of the model; None: not checked.

    Raises:
        AgreedError: data that cannot be read or do not fit the model, or ``checkpoint.keep_best``
            without validation data.
    """
    training, validation = run_on_all(lambda: _open(config, vocab_size))
    if config.checkpoint.keep_best and not validation:
        raise AgreedError(
            f"checkpoint.keep_best is {config.checkpoint.keep_best} and there is no validation "
            "data to tell the best by: give data.validation, or set it to 0"
        )
    return training, validation


def _open(
    config: RunConfig, vocab_size: int | None
) -> tuple[TokenDataset, dict[str, TokenDataset]]:
    data = config.data
    training = open_training_data(
        [{"path": s.path, "weight": s.weight} for s in data.train],
        sequence_length=data.sequence_length,
        packing=data.packing,
        document_mask=data.document_mask,
    )
    if vocab_size is not None:
        check_vocabulary(training, vocab_size)
    validation = {
        name: open_validation_data(
            list(paths),
            sequence_length=data.sequence_length,
            packing=data.packing,
            document_mask=data.document_mask,
        )
        for name, paths in validation_folders(config).items()
    }
    for dataset in validation.values():
        check_same_tokenizer(training, dataset)
    return training, validation


def validation_folders(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Folders of the validation sets by name: those of ``data.validation``, else those of the
    training data under the name "" if each has held documents out, else {}."""
    training = tuple(source.path for source in config.data.train)
    if config.data.validation_sets or not all(map(has_validation_split, training)):
        return config.data.validation_sets
    return {"": training}


def make_loader(
    config: RunConfig, data: TokenDataset, mesh: Mesh, first_batch: int, pin_memory: bool
) -> UpdateLoader:
    """This rank's training batches, from number ``first_batch`` on."""
    return UpdateLoader(
        data,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        seed=config.run.seed,
        start_update=first_batch,
        prefetch_updates=config.data.prefetch_updates,
        pin_memory=pin_memory,
        defer_errors=dist.get_world_size() > 1,
    )


def validation_batches(
    config: RunConfig, data: TokenDataset, mesh: Mesh
) -> dict[bool, EvaluationBatches]:
    """This rank's batches of a set's evaluations during the run (False) and after the last update
    (True)."""
    limits = {last: config.evaluation.limit(last) for last in (False, True)}
    batches = {  # one set where both are the same
        limit: EvaluationBatches(
            data,
            micro_batch_size=config.evaluation.micro_batch_size or config.train.micro_batch_size,
            rank=mesh.data_rank,
            world_size=mesh.data_size,
            max_targets=limit,
            defer_errors=dist.get_world_size() > 1,
        )
        for limit in set(limits.values())
    }
    return {last: batches[limit] for last, limit in limits.items()}
