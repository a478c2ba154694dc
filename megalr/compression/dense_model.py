"""A dense model in a transformers folder: its configuration, tensors and linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from megalr.errors import UserError
from megalr.files import read_json_object
from megalr.hf.factorized import LOWEST_TRANSFORMERS, auto_map
from megalr.hf.modeling_factorized import FACTORIZED, TRANSFORMERS
from megalr.hf.pretrained_config import (
    CONFIG_NAME,
    FACTORIZED_PREFIX,
    check_field_types,
    first_line,
)
from megalr.hf.read import INV_FREQ, Weights

HEAD = "lm_head.weight"
OLD_BUFFERS = (INV_FREQ, ".attn.bias", ".attn.masked_bias")
"""Suffixes of constants that older versions of transformers stored besides the weights."""


@dataclass(frozen=True)
class BlockLinear:
    """A linear layer that every block has: ``x W^T + bias`` with one or more matrices in W.

    Attributes:
        name: within the block, for example ``self_attn.q_proj``.
        inputs: n.
        parts: outputs m_i of its matrices, which lie side by side (q, k, v of GPT-2 and Phi-3).
        transposed: whether the folder stores ``W^T (n, sum m_i)``, as GPT-2 does.
    """

    name: str
    inputs: int
    parts: tuple[int, ...]
    transposed: bool

    @property
    def side(self) -> int:
        """The largest rank: the smallest side of its matrices."""
        return min(self.inputs, *self.parts)


class DenseModel:
    """The model in a folder; its tensors are read one at a time.

    Attributes:
        folder: the folder.
        family: key of ``modeling_factorized.TRANSFORMERS``.
        config: transformers' configuration.
        weights: the folder's tensors.
        names: those that make up the model, in its order, without a head that is tied.
        blocks: names of the blocks, for example ``model.layers.0``.
        linears: the linear layers of a block, by name.

    Raises:
        UserError: no such folder, another architecture, a factorized or quantized model, or files
            that are damaged or do not match config.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family, self.config = _configuration(folder)
        self.weights = Weights(folder)
        causal: Any = TRANSFORMERS[self.family][2]
        with torch.device("meta"):
            model = causal._from_config(self.config)
        base = model.base_model_prefix
        list_name = "h" if self.family == "gpt2" else "layers"
        blocks = getattr(model.base_model, list_name)
        self.blocks = [f"{base}.{list_name}.{number}" for number in range(len(blocks))]
        tied = {HEAD} if self.config.tie_word_embeddings else set()
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
        self.names = list(shapes)
        self._base = f"{base}."
        self._prefixed = any(name.startswith(self._base) for name in self.weights.names())
        self._check(shapes, tied)
        self.linears = self._linears(blocks[0])

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor of this name, as it is stored; UserError if it cannot be read."""
        return self.weights[self._stored(name)]

    def count(self, name: str) -> int:
        """Numbers in the tensor of this name."""
        return math.prod(self.weights.shape(self._stored(name)))

    def matrices(self, block: str, linear: BlockLinear) -> list[torch.Tensor]:
        """The matrices W_i (m_i, n) of a linear layer of a block."""
        weight = self[f"{block}.{linear.name}.weight"]
        weight = weight.mT if linear.transposed else weight  # (sum m_i, n)
        return list(weight.split(linear.parts))

    def _stored(self, name: str) -> str:
        """Its name in the files; a base model's folder lacks the first part."""
        return name if self._prefixed else name.removeprefix(self._base)

    def _check(self, shapes: dict[str, tuple[int, ...]], tied: set[str]) -> None:
        found = {name for name in self.weights.names() if not name.endswith(OLD_BUFFERS)}
        expected = {self._stored(name): shape for name, shape in shapes.items()}
        missing, foreign = sorted(expected.keys() - found), sorted(found - expected.keys() - tied)
        if missing or foreign:
            problem = f"lacks {missing[0]}" if missing else f"also holds {foreign[0]}"
            raise UserError(
                f"{self.folder}: {problem} ({len(missing)} tensors missing, {len(foreign)} "
                "unknown); it is not the plain model that its config.json names"
            )
        for name, shape in expected.items():
            if self.weights.shape(name) != shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {self.weights.shape(name)}, config.json says "
                    f"{shape}; copy the folder again"
                )
        if tied & found:
            embedding = next(
                n for n in expected if n.endswith(("embed_tokens.weight", "wte.weight"))
            )
            if not torch.equal(self.weights[HEAD], self.weights[embedding]):
                raise UserError(
                    f"{self.folder}: {HEAD} differs from {embedding} although config.json says "
                    "tie_word_embeddings true: set it to false to use this head"
                )

    def _linears(self, block: nn.Module) -> dict[str, BlockLinear]:
        """The linear layers of a block; the sizes of their parts are those of the model code."""
        plain = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        trial = self.factorized_config(dict.fromkeys(plain, 1), shared=False)
        causal: Any = FACTORIZED[self.family][2]
        with torch.device("meta"):
            model = causal._from_config(trial)
        found = {}
        for name, module in plain.items():
            new = model.get_submodule(f"{self.blocks[0]}.{name}")
            parts: Any = new.b if isinstance(new.b, nn.ModuleList) else [new.b]
            outputs = tuple(part.out_features for part in parts)
            inputs = new.a.in_features
            found[name] = BlockLinear(name, inputs, outputs, isinstance(module, Conv1D))
        return found

    def factorized_config(self, ranks: dict[str, int], shared: bool = True) -> Any:
        """The configuration of the model with these ranks, by names of linear layers."""
        config_class, _, causal = FACTORIZED[self.family]
        own = ("model_type", "architectures", "auto_map", "transformers_version")
        values = {key: value for key, value in self.config.to_dict().items() if key not in own}
        config: Any = config_class(**values)
        config.architectures = [causal.__name__]
        config.auto_map = auto_map(self.family)
        config.factorization = {
            "form": "product",
            "modules": {name: {"rank": rank} for name, rank in ranks.items()},
            "shared": shared and self.family != "gpt2",
            "transformers": LOWEST_TRANSFORMERS,
        }
        return config


def _configuration(folder: Path) -> tuple[str, Any]:
    path = folder / CONFIG_NAME
    if not path.exists():
        raise UserError(f"{path}: No such file; give a folder with a model of transformers")
    raw = read_json_object(path)
    family = raw.get("model_type")
    if str(family).startswith(FACTORIZED_PREFIX):
        raise UserError(f"{folder}: is factorized already; give the dense model it was made of")
    if family not in TRANSFORMERS:
        raise UserError(
            f"{folder}: architecture {family!r:.60} cannot be factorized; those that can: "
            f"{', '.join(TRANSFORMERS)}"
        )
    if raw.get("quantization_config") is not None:
        raise UserError(
            f"{folder}: the weights are quantized; factorize the model they were made of"
        )
    if family != "gpt2":  # whose fields have other names
        check_field_types(path, raw)
    config_class: Any = TRANSFORMERS[family][0]
    try:
        return family, config_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises nearly anything for a bad configuration
        raise UserError(
            f"{path}: transformers cannot read it ({first_line(error)}); copy the folder again"
        ) from error
