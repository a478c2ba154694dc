"""The unsharded decoder of a finished checkpoint, in one process and without an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from megalr.checkpoint import open_checkpoint
from megalr.checkpoint.manifest import Damaged, check_files
from megalr.checkpoint.reader import Checkpoint
from megalr.checkpoint.source import WORKING_DIRECTORY
from megalr.config.resuming import located
from megalr.config.schema import RunConfig
from megalr.data.manifest import load_manifest
from megalr.errors import UserError
from megalr.hf.init_from_pretrained import read_supports
from megalr.models.build import make_linear_of, sizes_of
from megalr.models.decoder import Decoder
from megalr.models.lr_transfer import scales_of
from megalr.preprocessing.tokenizer import Tokenizer, open_tokenizer
from megalr.run.folder import working_directory


def open_verified(run: Path, tag: str | None) -> Checkpoint:
    """A finished checkpoint of a run, opened after its files' checksums were verified.

    Args:
        run: the run's folder.
        tag: name of the checkpoint; None: the newest finished one.

    Raises:
        UserError: no such run or checkpoint; it is unfinished, damaged or not megalr's.
    """
    checkpoint = open_checkpoint(run, tag)
    files = checkpoint.manifest.files
    problem = check_files(checkpoint.folder, files, files, checksums=True)
    if problem is not None:
        raise UserError(
            f"checkpoint {checkpoint.folder} is damaged ({problem}): choose another one with --tag"
        )
    return checkpoint


def run_config(checkpoint: Checkpoint) -> RunConfig:
    """The run's configuration when the checkpoint was saved, its paths leading where they led then.

    Relative paths start from the working directory of the run, not of this process.

    Raises:
        UserError: this version of megalr does not accept it.
    """
    try:
        config = checkpoint.config
    except Damaged as error:
        raise UserError(
            f"checkpoint {checkpoint.folder}: {' '.join(str(error).split())}: use the version of "
            "megalr that wrote it"
        ) from error
    recorded = checkpoint.state.get(WORKING_DIRECTORY)
    start = working_directory(checkpoint.folder.parent.parent) if recorded is None else recorded
    return config if start is None else located(config, Path(start))


def load_decoder(run: Path, checkpoint: Checkpoint) -> Decoder:
    """The run's decoder on the CPU, float32, in eval mode, with the checkpoint's master weights.

    Raises:
        UserError: the checkpoint does not hold this decoder's parameters.
    """
    config = run_config(checkpoint)
    supports = read_supports(config, run)
    sizes = sizes_of(config)
    scales = scales_of(config.method, sizes.hidden_size)
    make_linear = make_linear_of(config.method, config.run.seed, supports, scales)
    decoder = Decoder(sizes, make_linear)
    parameters = dict(decoder.named_parameters())
    different = sorted(parameters.keys() ^ set(checkpoint.names()))
    if different:
        raise UserError(
            f"checkpoint {checkpoint.folder} is of another model: {different[0]} is in only one "
            "of the two; use the version of megalr that wrote it"
        )
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(_fitting(checkpoint, name, parameter.shape))
    except Damaged as error:
        raise UserError(
            f"checkpoint {checkpoint.folder} is damaged ({error}): choose another one with --tag"
        ) from error
    return decoder.eval()


def _fitting(checkpoint: Checkpoint, name: str, shape: torch.Size) -> torch.Tensor:
    value = checkpoint.parameter(name)
    if value.shape != shape:
        raise Damaged(f"{name} has shape {tuple(value.shape)} instead of {tuple(shape)}")
    return value


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """The tokenizer of the run's training data, from the data's folder.

    Raises:
        UserError: the folder is gone, or its tokenizer cannot be opened.
    """
    folder = Path(config.data.train[0].path)
    return open_tokenizer(folder / load_manifest(folder).tokenizer.path)
