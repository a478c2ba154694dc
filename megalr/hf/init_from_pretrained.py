"""Initialization of a run from a pretrained model (model.from_pretrained).

The folder is read only until the run has a checkpoint. Later starts find what they need in the
run's own folder: the sizes in config.yaml and the sparse supports that SLTrain chose.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from megalr.config.base import split_fork
from megalr.config.methods import LowRankMethod, SLTrainMethod
from megalr.config.model import ModelConfig
from megalr.config.schema import RunConfig
from megalr.data import TokenDataset
from megalr.distributed.agreement import is_rank0, raise_on_any_rank, run_on_all, run_on_rank0
from megalr.errors import UserError
from megalr.hf.compare_logits import check_same_function
from megalr.hf.pretrained_config import pretrained_sizes
from megalr.hf.read import (
    Weights,
    check_weights,
    load_linear,
    load_plain,
    named_linears,
    open_weights,
    read_weights,
)
from megalr.layers.linear import FactorizedLinear, GroupedLinear
from megalr.layers.lora import LoRALinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.build import (
    SparseIndices,
    build_decoder,
    build_model,
    has_sparse_indices,
    sizes_of,
)
from megalr.models.config import decoder_config
from megalr.models.decoder import Decoder
from megalr.models.drawing import Fill, draw_piece
from megalr.preprocessing.compare_tokenizers import tokenizer_difference
from megalr.preprocessing.tokenizer import holds_tokenizer, open_tokenizer
from megalr.run.folder import CONFIG
from megalr.sharding.tensor_shard import shard_of
from megalr.tensor_parallel.mesh import Mesh

SUPPORTS = "sltrain_supports.safetensors"
"""File in a run's folder with the positions of the sparse entries of an imported SLTrain model."""


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        folder: the pretrained model's folder.
        relative_error: ``|W - W_model| / |W|`` (Frobenius) of every block matrix.
        supports: positions of SLTrain's sparse entries by matrix; None for other methods.
        seconds: wall-clock time.
    """

    folder: str
    relative_error: dict[str, float]
    supports: SparseIndices | None
    seconds: float

    def by_projection(self) -> dict[str, tuple[float, float]]:
        """Mean and largest error over the layers, by the matrices' short names (q, k, ...)."""
        found: dict[str, list[float]] = {}
        for name, error in self.relative_error.items():
            found.setdefault(name.rsplit(".", 1)[1], []).append(error)
        return {name: (sum(errors) / len(errors), max(errors)) for name, errors in found.items()}

    def metrics(self) -> dict[str, Any]:
        """The numbers of the ``import`` event."""
        errors = list(self.relative_error.values())
        return {
            "folder": self.folder,
            "matrices": len(errors),
            "relative_error_mean": sum(errors) / len(errors),
            "relative_error_max": max(errors),
            "relative_error": self.relative_error,
            "import_seconds": self.seconds,
        }


def initial_model(
    config: RunConfig,
    device: torch.device,
    mesh: Mesh,
    saved_in: Path | None,
    empty: bool = False,
) -> tuple[Decoder, Imported | None, Fill | None]:
    """This rank's shard of the initial decoder, and the import's result if there was one.

    Collective. With ``saved_in``, the folder of a run, the weights will come from its checkpoint
    and nothing is imported. With ``empty`` the matrices have no memory yet, and what fills them is
    the third result (models.drawing).

    Raises:
        UserError: a method, rank or layout that does not fit the model, or a pretrained model that
            cannot be read.
    """
    if config.model.from_pretrained is None or saved_in is not None:
        supports = None
        if saved_in is not None:
            supports = run_on_all(lambda: read_supports(config, saved_in))
        decoder = build_model(config, device, mesh, supports, empty=empty)
        seed = config.run.seed
        return decoder, None, partial(draw_piece, decoder, seed=seed) if empty else None
    folder = Path(config.model.from_pretrained)
    run_on_all(lambda: open_weights(folder, sizes_of(config)))  # before memory is allocated
    difference = run_on_rank0(lambda: check_same_function(folder, sizes_of(config)))
    if is_rank0():
        print(f"{folder}: logits agree with transformers to {difference:.1e}", flush=True)
    if mesh.tensor_size == 1 and not empty:
        decoder = build_model(config, device)
        return decoder, import_weights(folder, decoder, device), None
    # A GPU may not have room for the whole model: assemble it on the CPU, then shard it.
    whole = build_model(config, torch.device("cpu"))
    imported = import_weights(folder, whole, device)
    decoder = build_model(config, device, mesh, imported.supports, empty=empty)
    if empty:
        return decoder, imported, lambda piece: load_shard(decoder, whole, piece)
    load_shard(decoder, whole)
    return decoder, imported, None


def with_pretrained_sizes(config: RunConfig) -> RunConfig:
    """The configuration with the model's sizes filled in from ``model.from_pretrained``, if given.

    Collective. An existing run keeps the sizes it started with, and a fork those of its source, so
    the pretrained model's folder may be gone by then.

    Raises:
        UserError: a folder that cannot be read, or sizes that contradict it.
    """
    if config.model.from_pretrained is None:
        return config
    sizes = run_on_rank0(lambda: _sizes(config))
    return config.model_copy(update={"model": config.model.model_copy(update=sizes)})


def _sizes(config: RunConfig) -> dict[str, Any]:
    """Values of section ``model`` that the configuration does not set."""
    given = dict(config.model)
    saved = _saved_model(config)
    if saved is not None:
        return {key: value for key, value in saved.items() if given.get(key, value) is None}
    sizes = pretrained_sizes(Path(str(config.model.from_pretrained)))
    wrong = [k for k, v in sizes.items() if given[k] is not None and given[k] != v]
    if wrong:
        listed = "; ".join(f"model.{key} is {given[key]}, there {sizes[key]}" for key in wrong)
        raise UserError(
            f"model.from_pretrained {config.model.from_pretrained} has other sizes ({listed}): "
            "leave these keys out"
        )
    return sizes


def _saved_model(config: RunConfig) -> dict[str, Any] | None:
    """Section ``model`` of the run in ``run.dir``, or of the one that it is a fork of, if that
    started from the same pretrained model."""
    fork_from = config.run.fork_from
    for folder in (config.run.dir, *([split_fork(fork_from)[0]] if fork_from else [])):
        try:
            text = (Path(folder) / CONFIG).read_text(encoding="utf-8")
            model = ModelConfig.model_validate(yaml.safe_load(text)["model"])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValidationError):
            continue  # no run there, or one that check_run_folder or open_fork will report
        if model.from_pretrained == config.model.from_pretrained:
            return dict(model)
    return None


def check_pretrained_tokenizer(config: RunConfig, data: TokenDataset) -> None:
    """Raise UserError unless the data was made with the pretrained model's tokenizer.

    Called on one rank, before the first checkpoint. If the folder has no tokenizer, only the
    vocabulary's size is checked.
    """
    folder = Path(str(config.model.from_pretrained))
    size = config.model.vocab_size
    if size is not None and data.vocab_size > size:
        raise UserError(
            f"{data.sources[0].path}: its tokenizer has {data.vocab_size} ids and the model in "
            f"{folder} {size}: preprocess the text with the model's tokenizer (--tokenizer "
            f"{folder})"
        )
    if holds_tokenizer(folder):
        check_same_tokenizers(data, folder)


def check_same_tokenizers(data: TokenDataset, folder: Path) -> None:
    """Raise UserError unless the tokenizers of ``data`` and of the model in ``folder`` agree."""
    difference = tokenizer_difference(open_tokenizer(data.tokenizer_path), open_tokenizer(folder))
    if difference is not None:
        raise UserError(
            f"{data.sources[0].path} was made with another tokenizer than the model in {folder}: "
            f"{difference}; preprocess the text with --tokenizer {folder}"
        )


def import_weights(folder: Path, decoder: Decoder, device: torch.device) -> Imported:
    """Load the folder's weights into an unsharded decoder. Collective.

    The decompositions are distributed over the ranks and their results broadcast, so all ranks hold
    identical bits.

    Args:
        folder: the pretrained model.
        decoder: of its sizes, not sharded by tensor parallelism; on any device.
        device: where this rank computes the decompositions.

    Raises:
        UserError: files that are damaged or do not match the configuration.
    """
    started = time.perf_counter()
    weights = run_on_all(lambda: _checked_weights(decoder, folder))
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    errors: dict[str, float] = {}
    failure: UserError | None = None
    try:
        load_plain(decoder, weights)
    except UserError as error:
        failure = error
    for number, (layer, names) in enumerate(named_linears(decoder, weights)):
        stored, _ = layer.layer_of(0)
        shared = isinstance(stored, FactorizedLinear) and not isinstance(stored, LoRALinear)
        owner = number % world
        if failure is None and (not shared or owner == rank):
            try:
                with _in_float32(layer):
                    errors |= load_linear(layer, names, weights, device)
            except UserError as error:
                failure = error
        if shared and world > 1:
            _broadcast(layer, owner, device)
    raise_on_any_rank(failure)
    if world > 1:
        found: list[dict[str, float]] = [{}] * world
        dist.all_gather_object(found, errors)
        errors = {name: error for own in found for name, error in own.items()}
    order = [name for layer in decoder.linears() for name in layer.shape.names]
    return Imported(
        folder=str(folder),
        relative_error={name: errors[name] for name in order},
        supports=_supports_of(decoder),
        seconds=round(time.perf_counter() - started, 3),
    )


def trial_import(folder: Path, rank: int, density: float | None) -> Imported:
    """Factorize a pretrained model in this process and report the error, to choose a rank.

    Args:
        folder: the pretrained model.
        rank: of the factors.
        density: of SLTrain's sparse part; None selects method low_rank.

    Raises:
        UserError: a model that cannot be read, a rank or density out of range.
    """
    kind = LowRankMethod if density is None else SLTrainMethod
    values = {"rank": rank} if density is None else {"rank": rank, "density": density}
    try:
        method = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = decoder_config(None, pretrained_sizes(folder))
    open_weights(folder, sizes)
    with device:
        decoder = build_decoder(sizes, method, seed=0)
    return import_weights(folder, decoder, device)


def _checked_weights(decoder: Decoder, folder: Path) -> Weights:
    weights = read_weights(folder)
    check_weights(decoder, weights)
    return weights


@contextlib.contextmanager
def _in_float32(layer: GroupedLinear) -> Iterator[None]:
    """Inside, the layer's parameters are float32; afterwards rounded to the dtype they had."""
    dtype = next(layer.parameters()).dtype
    layer.float()
    yield
    layer.to(dtype)


def _broadcast(layer: GroupedLinear, owner: int, device: torch.device) -> None:
    """Broadcast a layer's tensors from its owner."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        values = tensor.detach().to(device)
        dist.broadcast(values, owner)
        tensor.detach().copy_(values)


def _supports_of(decoder: Decoder) -> SparseIndices | None:
    layers = [layer for layer in decoder.linears() if isinstance(layer, SLTrainLinear)]
    if not layers:
        return None
    return {
        name: layer.support_positions(index)
        for layer in layers
        for index, name in enumerate(layer.shape.names)
    }


@torch.no_grad()
def load_shard(decoder: nn.Module, whole: nn.Module, piece: nn.Module | None = None) -> None:
    """Copy this rank's tensor-parallel shard from the unsharded decoder ``whole``.

    ``piece``: the part of the decoder to fill; None: all of it.
    """
    full = dict(whole.named_parameters())
    wanted = set((piece or decoder).parameters())
    for name, parameter in decoder.named_parameters():
        if parameter in wanted:
            shard = shard_of(parameter)
            parameter.copy_(full[name] if shard is None else shard.take(full[name]))


def write_supports(folder: Path, supports: SparseIndices | None) -> None:
    """Write the supports (if any) into the run's folder, atomically; called on one rank.

    Raises:
        UserError: the folder cannot be written.
    """
    if supports is None:
        return
    path = folder / SUPPORTS
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: np.ascontiguousarray(s) for name, s in supports.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}: free space or fix the path") from error


def read_supports(config: RunConfig, folder: Path) -> SparseIndices | None:
    """The supports of an imported SLTrain model; None for runs whose supports follow from the seed.

    Raises:
        UserError: the file is missing or damaged.
    """
    if config.model.from_pretrained is None or not has_sparse_indices(config.method):
        return None
    path = folder / SUPPORTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); it holds the positions of this run's sparse "
            "entries: restore it, the checkpoints cannot be used without it"
        ) from error
