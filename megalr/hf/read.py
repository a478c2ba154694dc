"""Reading a transformers folder into a decoder, dense or factorized by truncated SVD."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalr.errors import UserError
from megalr.hf.names import block_linears, plain_tensors
from megalr.layers.linear import GroupedLinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.decoder import Decoder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DERIVED = "rotary_emb.inv_freq"
"""Name suffix of tensors that older versions stored although the configuration determines them."""


class Weights:
    """The tensors of a folder's ``*.safetensors``, read on demand.

    Raises:
        UserError: missing or damaged files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._file_names():
            try:
                file = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{folder / name}: cannot be read ({reason}); copy the folder again"
                ) from error
            self._files[name] = file
            self._file_of |= dict.fromkeys(file.keys(), name)

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise UserError(
                    f"{self.folder}: holds no {SINGLE} (nor {INDEX}); load the model with "
                    "transformers and save_pretrained it to write one"
                )
            return [SINGLE]
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return sorted(set(table.values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: no index of weights; copy the folder again") from error

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, on the CPU; UserError if it cannot be read or is not finite."""
        try:
            tensor = self._files[self._file_of[name]].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / self._file_of[name]}: {name} cannot be read ({error}); copy the "
                "folder again"
            ) from error
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{self.folder}: {name} holds numbers that are not finite")
        return tensor


def check_weights(decoder: Decoder, weights: Weights) -> None:
    """Raise UserError unless the folder holds exactly the decoder's tensors, with its shapes.

    ``decoder`` is not sharded by tensor parallelism.
    """
    expected = dict(_expected_shapes(decoder))
    found = {name for name in weights.names() if not name.endswith(DERIVED)}
    missing = sorted(expected.keys() - found)
    tied = {"lm_head.weight"} if decoder.config.tie_embeddings else set()
    foreign = sorted(found - expected.keys() - tied)
    if missing or foreign:
        problem = f"lacks {missing[0]}" if missing else f"also holds {foreign[0]}"
        counts = f"{len(missing)} tensors missing, {len(foreign)} unknown"
        raise UserError(
            f"{weights.folder}: {problem} ({counts}); it is not the plain model that its "
            "config.json names"
        )
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"{weights.folder}: {name} has shape {weights.shape(name)}, config.json says "
                f"{shape}; copy the folder again"
            )


def _expected_shapes(decoder: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tensor in plain_tensors(decoder):
        yield name, tuple(tensor.shape)
    for layer, names in named_linears(decoder):
        for name, rows in zip(names, layer.shape.out_used, strict=True):
            yield f"{name}.weight", (rows, layer.shape.in_used)


def named_linears(decoder: Decoder) -> list[tuple[GroupedLinear, list[str]]]:
    """The linear layers of all blocks with their matrices' names in the folder."""
    return [
        pair
        for number, block in enumerate(decoder.blocks())
        for pair in block_linears(block, number)
    ]


@torch.no_grad()
def load_plain(decoder: Decoder, weights: Weights) -> None:
    """Load everything but the block matrices (embedding, head, norms, biases), exactly."""
    for name, tensor in plain_tensors(decoder):
        tensor.copy_(weights[name])


@torch.no_grad()
def load_linear(
    layer: GroupedLinear, names: list[str], weights: Weights, device: torch.device
) -> Mapping[str, float]:
    """Load the matrices of one linear layer from the folder, as closely as its kind allows.

    Dense and LoRA layers take them exactly; factors are the truncated SVD, computed in float64 on
    ``device``; SLTrain's sparse part takes the largest entries of the residual.

    Returns:
        ``|W - W_layer| / |W|`` (Frobenius) by matrix name.
    """
    errors = {}
    for index, name in enumerate(names):
        weight = weights[f"{name}.weight"].to(device).float()
        try:
            if isinstance(layer, SLTrainLinear):
                layer.load_dense_and_support(index, weight)
            else:
                layer.load_dense(index, weight)
        except torch.linalg.LinAlgError as failure:
            raise UserError(f"{weights.folder}: the SVD of {name} failed ({failure})") from failure
        difference = weight - layer.dense_weight(index).to(device)
        size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        error = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        errors[layer.shape.names[index]] = error / size if size > 0 else 0.0
    return errors
