"""Export of a run's checkpoint to a transformers folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megalr.checkpoint.reader import Checkpoint
from megalr.config.restarts import RestartsConfig
from megalr.config.schema import RunConfig
from megalr.errors import UserError
from megalr.hf.card import model_card
from megalr.hf.families import families_of
from megalr.hf.trained_run import (
    load_decoder,
    open_verified,
    run_config,
    tokenizer_of,
)
from megalr.hf.write import ExportOptions, check_output, write_model
from megalr.layers.linear import GroupedLinear
from megalr.models.build import has_dense_weights, has_factors, sizes_of
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Decoder
from megalr.preprocessing.compare_tokenizers import tokenizer_difference
from megalr.preprocessing.tokenizer import Tokenizer, open_tokenizer
from megalr.run.metrics_reader import perplexity_of, read_run
from megalr.version import __version__

NO_TOKENIZER = "none"
"""Given instead of a tokenizer's path: export without a tokenizer."""

TENSOR_CORES = 8
"""GPUs multiply 16-bit matrices slowly whose sides are no multiple of this."""


def export_run(
    run: Path,
    tag: str | None,
    output: Path,
    dtype: str,
    max_shard_size: str,
    tokenizer: str | None,
    form: str = "dense",
    keep_padding: bool = False,
) -> Checkpoint:
    """Write the model of a checkpoint to ``output``; all of it or nothing.

    Args:
        run: the run's folder.
        tag: name of the checkpoint; None: the newest finished one.
        output: new or empty folder.
        dtype: key of ``megalr.hf.write.DTYPES``.
        max_shard_size: largest weight file ("5GB").
        tokenizer: path of a tokenizer, ``none``, or None for that of the training data.
        form: ``dense`` or ``factorized``.
        keep_padding: see :func:`count_padding`.

    Returns:
        The checkpoint that was exported.

    Raises:
        UserError: anything the user can correct; nothing is left at ``output``.
    """
    check_output(output)
    checkpoint = open_verified(run, tag)
    config = run_config(checkpoint)
    sizes = sizes_of(config)
    families_of(sizes)  # fail before reading gigabytes
    _check_form(run, config, form)
    chosen = _tokenizer(config, tokenizer)
    decoder = load_decoder(run, checkpoint)
    width, padded = sizes.intermediate_size, sizes.padded_intermediate_size
    if keep_padding:
        count_padding(decoder)
    elif width % TENSOR_CORES and width < padded:
        print(
            f"note: the MLP is {width} wide, which is slow on GPUs: --keep_padding writes "
            f"{padded}, the rest zeros",
            flush=True,
        )
    evaluation = {
        "tokens": config.evaluation.limit(last=True),
        "packing": config.data.packing,
        "document_mask": config.data.document_mask,
    }
    options = ExportOptions(dtype, max_shard_size, config.data.sequence_length, evaluation, form)
    rows = _facts(run, checkpoint, config, decoder.config, dtype)
    tags = [config.method.name, config.optimizer.name, families_of(sizes)[0]]
    card = model_card(run.resolve().name, tags, rows, form == "factorized")
    write_model(decoder, output, options, chosen, card)
    return checkpoint


def count_padding(decoder: Decoder) -> None:
    """Make the padding of the MLP's width part of the decoder's sizes: ``model.pad_multiple``.

    Rows of gate and up and columns of down that are zero then belong to the matrices. The function
    stays: every activation is zero at zero. The vocabulary is not changed.
    """
    width = decoder.config.padded_intermediate_size
    decoder.config = replace(decoder.config, intermediate_size=width)
    for layer in decoder.modules():
        if isinstance(layer, GroupedLinear):
            shape = layer.shape
            layer.shape = replace(shape, in_used=shape.in_features, out_used=shape.out_features)


def _check_form(run: Path, config: RunConfig, form: str) -> None:
    """Raise UserError unless the run's model has this form."""
    name = config.method.name
    if form == "factorized" and not has_factors(config.method):
        raise UserError(
            f"--form factorized: {run} was trained with method {name}, which stores dense "
            "matrices: use --form dense"
        )
    if form == "dense" and not has_dense_weights(config.method):
        raise UserError(
            f"{run} was trained with method {name}, which has a nonlinearity between its factors: "
            "no dense weights have the same function; use --form factorized"
        )


def _tokenizer(config: RunConfig, given: str | None) -> Tokenizer | None:
    if given == NO_TOKENIZER:
        return None
    chosen = open_tokenizer(given) if given is not None else None
    try:
        trained = tokenizer_of(config)
    except UserError as error:
        if chosen is None:
            raise UserError(
                f"the tokenizer of the training data cannot be read ({error}); give it with "
                f"--tokenizer PATH, or --tokenizer {NO_TOKENIZER}"
            ) from error
        print(f"note: --tokenizer {given} was not compared with training's: {error}", flush=True)
        return chosen
    if chosen is None:
        return trained
    difference = tokenizer_difference(trained, chosen)
    if difference is not None:
        raise UserError(
            f"--tokenizer {given} gives other ids than the tokenizer of the training data, "
            f"{trained.path}: {difference}"
        )
    return chosen


def _facts(
    run: Path, checkpoint: Checkpoint, config: RunConfig, sizes: DecoderConfig, dtype: str
) -> dict[str, Any]:
    """Rows of the model card's table."""
    perplexity, when = _perplexity(run, checkpoint)
    return {
        "start": config.model.from_pretrained or f"random weights, {config.model.preset}",
        "sizes": f"hidden {sizes.hidden_size}, MLP {sizes.intermediate_size}, "
        f"{sizes.num_layers} layers, {sizes.num_heads} heads, vocabulary {sizes.vocab_size}",
        "method": _described(config.method.model_dump()),
        "optimizer": _described(config.optimizer.model_dump()),
        "restarts": _restarts(config.restarts),
        "updates": checkpoint.update,
        "training tokens": checkpoint.tokens,
        "sequence length": config.data.sequence_length,
        "global batch (sequences)": config.train.global_batch_size,
        "training precision": config.train.precision,
        "validation perplexity": perplexity,
        "evaluated after (updates)": when,
        "data": ", ".join(Path(source.path).name for source in config.data.train),
        "dtype of these weights": dtype,
        "checkpoint": checkpoint.folder.name,
        "megalr": __version__,
    }


def _restarts(restarts: RestartsConfig) -> str:
    parts = [
        f"{name} every {period} updates"
        for name, period in (
            ("refactorization", restarts.refactorize_period),
            ("momentum reset", restarts.reset_period),
        )
        if period
    ]
    return ", ".join(parts) or "none at fixed intervals"


def _described(values: dict[str, Any]) -> str:
    """For example ``low_rank (rank 128, alpha 32.0)``: the name and all values that are set."""
    rest = {key: value for key, value in values.items() if key != "name" and value is not None}
    listed = ", ".join(f"{key} {_short(value)}" for key, value in rest.items())
    return f"{values['name']} ({listed})" if listed else str(values["name"])


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _perplexity(run: Path, checkpoint: Checkpoint) -> tuple[float | None, int | None]:
    """Newest validation perplexity up to the checkpoint, and the update it was measured at."""
    if checkpoint.validation_loss is not None:
        return perplexity_of(checkpoint.validation_loss), checkpoint.update
    try:
        evaluations = read_run(run).series("eval")
    except UserError:
        return None, None  # shown as "not known"
    before = [event for event in evaluations if event["update"] <= checkpoint.update]
    return (before[-1]["perplexity"], before[-1]["update"]) if before else (None, None)
