"""The start of a run from a pretrained model (model.from_pretrained) instead of random weights.

The folder is read before the first checkpoint only. What a later start needs of it is kept in the
run's folder: its sizes in config.yaml, and the supports that SLTrain chose.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
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

from megalr.config.methods import LowRankMethod, SLTrainMethod
from megalr.config.schema import RunConfig
from megalr.data import TokenDataset
from megalr.distributed.agreement import raise_on_any_rank, run_on_all, run_on_rank0
from megalr.errors import UserError
from megalr.hf.families import pretrained_sizes
from megalr.hf.read import Weights, check_weights, load_linear, load_plain, named_linears
from megalr.layers.linear import FactorizedLinear, GroupedLinear
from megalr.layers.lora import LoRALinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.build import SparseIndices, build_decoder, build_model
from megalr.models.config import decoder_config
from megalr.models.decoder import Decoder
from megalr.preprocessing.tokenizer import open_tokenizer
from megalr.run.folder import CONFIG
from megalr.sharding.tensor_shard import shard_of
from megalr.tensor_parallel.mesh import Mesh

SUPPORTS = "sltrain_supports.safetensors"
"""File of a run's folder: where the sparse parts of an imported SLTrain model have entries."""


@dataclass(frozen=True)
class Imported:
    """What was read from a pretrained model.

    Attributes:
        folder: where it lies.
        relative_error: ``|W - W_model| / |W|`` (Frobenius) of every matrix of the blocks.
        supports: positions of SLTrain's sparse parts by matrix; None for other methods.
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
    config: RunConfig, device: torch.device, mesh: Mesh, resuming: bool
) -> tuple[Decoder, Imported | None]:
    """This rank's part of the run's decoder as the run starts, and what was imported into it.

    Every rank must call it. When ``resuming``, the weights are to come from the checkpoint and
    nothing is imported.

    Raises:
        UserError: a method, rank or layout that does not fit the model, or a pretrained model that
            cannot be read.
    """
    if config.model.from_pretrained is None:
        return build_model(config, device, mesh), None
    if resuming:
        supports = run_on_all(lambda: read_supports(config, Path(config.run.dir)))
        return build_model(config, device, mesh, supports), None
    folder = Path(config.model.from_pretrained)
    if mesh.tensor_size == 1:
        decoder = build_model(config, device)
        return decoder, import_weights(folder, decoder, device)
    # A GPU may not have room for the whole model: it is put together on the CPU, then cut.
    whole = build_model(config, torch.device("cpu"))
    imported = import_weights(folder, whole, device)
    decoder = build_model(config, device, mesh, imported.supports)
    take_part(decoder, whole)
    return decoder, imported


def with_pretrained_sizes(config: RunConfig) -> RunConfig:
    """The configuration with the model's sizes filled in from ``model.from_pretrained``, if given.

    Every rank must call it. A run that was begun keeps the sizes that it began with, so that its
    folder may be gone then.

    Raises:
        UserError: a folder that cannot be read, or sizes that contradict it.
    """
    if config.model.from_pretrained is None:
        return config
    sizes = run_on_rank0(lambda: _sizes(config))
    return config.model_copy(update={"model": config.model.model_copy(update=sizes)})


def _sizes(config: RunConfig) -> dict[str, Any]:
    """Values of section ``model`` that the configuration leaves open."""
    given = config.model.model_dump()
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
    """Section ``model`` of the run in the folder, if it began with the same pretrained model."""
    path = Path(config.run.dir) / CONFIG
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        same = model["from_pretrained"] == config.model.from_pretrained
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None  # no run there, or one that the check of the folder will name
    return model if same else None


def check_pretrained_tokenizer(config: RunConfig, data: TokenDataset) -> None:
    """Raise UserError if the data was made with another tokenizer than the pretrained model's.

    Called on one rank, before the first checkpoint. A folder without tokenizer files says nothing:
    then only the size of the vocabulary is checked.
    """
    folder = Path(str(config.model.from_pretrained))
    size = config.model.vocab_size
    if size is not None and data.vocab_size > size:
        raise UserError(
            f"{data.sources[0].path}: its tokenizer has {data.vocab_size} ids and the model in "
            f"{folder} {size}: preprocess the text with the model's tokenizer (--tokenizer "
            f"{folder})"
        )
    if (folder / "tokenizer_config.json").is_file():
        check_same_pieces(data, folder)


def check_same_pieces(data: TokenDataset, folder: Path) -> None:
    """Raise UserError unless every id means the same in ``data`` and in the model of ``folder``."""
    mine = open_tokenizer(data.tokenizer_path).piece_ids()
    theirs = open_tokenizer(folder).piece_ids()
    for piece, number in sorted(mine.items(), key=lambda item: item[1]):
        if theirs.get(piece) != number:
            raise UserError(
                f"{data.sources[0].path} was made with another tokenizer than the model in "
                f"{folder}: {piece!r} is {number} there and {theirs.get(piece, 'no id')} here; "
                f"preprocess the text with --tokenizer {folder}"
            )


def import_weights(folder: Path, decoder: Decoder, device: torch.device) -> Imported:
    """Set the weights of a whole decoder from the folder; every rank must call it.

    The decompositions are shared out over the ranks and their results broadcast, so that all ranks
    hold the same bits.

    Args:
        folder: with the pretrained model.
        decoder: of its sizes, not cut by tensor parallelism; on any device.
        device: where this rank computes.

    Raises:
        UserError: files that are damaged or do not fit the configuration.
    """
    started = time.perf_counter()
    weights = run_on_all(lambda: _checked_weights(decoder, folder))
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    errors: dict[str, float] = {}
    trouble: UserError | None = None
    try:
        load_plain(decoder, weights)
    except UserError as error:
        trouble = error
    for number, (layer, names) in enumerate(named_linears(decoder)):
        shared = isinstance(layer, FactorizedLinear) and not isinstance(layer, LoRALinear)
        owner = number % world
        if trouble is None and (not shared or owner == rank):
            try:
                errors |= load_linear(layer, names, weights, device)
            except UserError as error:
                trouble = error
        if shared and world > 1:
            _broadcast(layer, owner, device)
    raise_on_any_rank(trouble)
    if world > 1:
        found: list[dict[str, float]] = [{}] * world
        dist.all_gather_object(found, errors)
        errors = {name: error for part in found for name, error in part.items()}
    order = [name for layer in decoder.linears() for name in layer.shape.names]
    return Imported(
        folder=str(folder),
        relative_error={name: errors[name] for name in order},
        supports=_supports_of(decoder),
        seconds=round(time.perf_counter() - started, 3),
    )


def trial_import(folder: Path, rank: int, density: float | None) -> Imported:
    """Factorize a pretrained model in this process, to see what is lost; for choosing a rank.

    Args:
        folder: with the pretrained model.
        rank: of the factors.
        density: of SLTrain's sparse part; None: method low_rank.

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
    with device:
        decoder = build_decoder(sizes, method, seed=0)
    return import_weights(folder, decoder, device)


def _checked_weights(decoder: Decoder, folder: Path) -> Weights:
    weights = Weights(folder)
    check_weights(decoder, weights)
    return weights


def _broadcast(layer: GroupedLinear, owner: int, device: torch.device) -> None:
    """Give all ranks the owner's tensors of a layer."""
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
def take_part(decoder: nn.Module, whole: nn.Module) -> None:
    """Set this rank's part of a decoder cut by tensor parallelism from the whole one."""
    full = dict(whole.named_parameters())
    for name, parameter in decoder.named_parameters():
        shard = shard_of(parameter)
        parameter.copy_(full[name] if shard is None else shard.take(full[name]))


def write_supports(folder: Path, supports: SparseIndices | None) -> None:
    """Write them (if any) into the run's folder, whole or not at all; called on one rank.

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
    """What :func:`write_supports` wrote; None if the run's supports follow from its seed.

    Raises:
        UserError: the file is missing or damaged.
    """
    if config.model.from_pretrained is None or config.method.name != "sltrain":
        return None
    path = folder / SUPPORTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); it says where the sparse entries of this run lie: "
            "put it back, the checkpoints are of no use without it"
        ) from error
