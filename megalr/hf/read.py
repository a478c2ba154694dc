"""Reading a transformers folder into a decoder, dense or factorized by truncated SVD."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalr.errors import UserError
from megalr.files import read_json_object
from megalr.hf.names import block_linears, is_stacked, llama_parts, plain_tensors, rows_of
from megalr.hf.pretrained_config import CONFIG_NAME, FACTORIZED_PREFIX
from megalr.layers.linear import DenseLinear, GroupedLinear
from megalr.layers.sltrain import SLTrainLinear
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Decoder
from megalr.models.rope import rope_frequencies

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FACTOR = re.compile(r"(?P<module>.*)\.b(\.\d+)?\.(?P<kind>weight|bias)")
"""Names of the factors B of a factorized folder, and of their biases."""
INV_FREQ = "rotary_emb.inv_freq"
"""Name suffix of RoPE's frequencies, which older versions stored although theta determines them."""
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")
"""Name suffixes of GPT-2's masks, which older versions stored."""
CONV1D = ".c_"
"""In the names of GPT-2's matrices, which are stored as ``(in, out)``."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""Dtypes of weights, by their names in a safetensors header."""


class Weights:
    """The tensors of a folder's ``*.safetensors``, read on demand.

    Attributes:
        folder: the folder.
        dtype: that of all tensors, float32 if they differ.

    Raises:
        UserError: missing or damaged files, an index that names other files than the folder's own
            or does not match them, tensors of a dtype that no weight has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = _read_index(folder)
        for name in sorted(set(index.values())) if index is not None else [SINGLE]:
            try:
                file = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{folder / name}: cannot be read ({reason}); copy the folder again"
                ) from error
            self._files[name] = file
            for key in file.keys():  # noqa: SIM118 (a safe_open object is no dict)
                if index is not None and index.get(key) != name:
                    where = f"in {index[key]}" if key in index else "nowhere"
                    raise UserError(
                        f"{folder / name}: holds {key}, which {INDEX} has {where}; copy the folder "
                        "again"
                    )
                self._file_of[key] = name
        absent = sorted(set(index or ()) - self._file_of.keys())
        if index is not None and absent:
            raise UserError(
                f"{folder / index[absent[0]]}: lacks {absent[0]}, which {INDEX} has there; copy "
                "the folder again"
            )
        dtypes = {self._dtype(name) for name in self._file_of}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _dtype(self, name: str) -> torch.dtype:
        stored = str(self._files[self._file_of[name]].get_slice(name).get_dtype())
        if stored not in DTYPES:
            raise UserError(
                f"{self.folder}: {name} has dtype {stored}, weights have {', '.join(DTYPES)}: "
                "load the model with transformers and save it as float32 or bfloat16"
            )
        return DTYPES[stored]

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


class ProductWeights(Weights):
    """The tensors of a factorized folder under the names of the dense model: matrices are B A.

    B A is multiplied in float32 when it is read.

    Raises:
        UserError: as :class:`Weights`, or a factor without the other one.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._parts: dict[str, list[str]] = {}
        self._first_rows: dict[str, int] = {}
        stored = super().names()
        for name in sorted(stored):
            found = FACTOR.fullmatch(name)
            if found is not None:  # parts of a stacked matrix come in their order: b.0, b.1, ...
                self._parts.setdefault(f"{found['module']}.{found['kind']}", []).append(name)
            elif not name.endswith((".a.weight", ".shared_a.weight")):
                self._parts[name] = [name]
        for name, parts in self._parts.items():
            if name.endswith(".weight") and parts != [name]:
                self._place(name, parts)

    def _a_of(self, name: str) -> str:
        """The tensor that holds the factor A of a matrix."""
        own = f"{name.removesuffix('.weight')}.a.weight"
        shared = own not in self._file_of and name in self._sharing(name)
        return f"{name.rsplit('.', 2)[0]}.shared_a.weight" if shared else own

    @staticmethod
    def _sharing(name: str) -> list[str]:
        """The matrices whose factors A may be one tensor with that of this matrix, in order."""
        # Here, since it imports transformers, and every run imports this module.
        from megalr.hf.modeling_factorized import SHARED_INPUT

        parent = name.rsplit(".", 2)[0]
        leaves = SHARED_INPUT.get(parent.rpartition(".")[2], ())
        return [f"{parent}.{leaf}.weight" for leaf in leaves]

    def _place(self, name: str, parts: list[str]) -> None:
        """Where in its tensor the rows of A of each part begin."""
        a = self._a_of(name)
        together = parts
        if a.endswith(".shared_a.weight"):
            together = [f"{n.removesuffix('weight')}b.weight" for n in self._sharing(name)]
        row = 0
        for each in (a, *together):
            if each not in self._file_of:
                raise UserError(f"{self.folder}: lacks {each}; copy the folder again")
            if len(super().shape(each)) != 2:
                raise UserError(f"{self.folder}: {each} is no matrix; copy the folder again")
        for each in together:
            self._first_rows[each] = row
            row += super().shape(each)[1]
        if row != super().shape(a)[0]:
            raise UserError(
                f"{self.folder}: {a} has {super().shape(a)[0]} rows and {together[-1]} ends at "
                f"{row}; copy the folder again"
            )

    def names(self) -> list[str]:
        """Names of all tensors of the dense model."""
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the dense model."""
        shapes = [super(ProductWeights, self).shape(part) for part in self._parts[name]]
        rows = sum(shape[0] for shape in shapes)
        if self._parts[name][0] in self._first_rows:
            return rows, super().shape(self._a_of(name))[1]
        return rows, *shapes[0][1:]

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor of the dense model, a product in float32; UserError as for :class:`Weights`."""
        found = []
        for part in self._parts[name]:
            tensor = super().__getitem__(part)
            if part in self._first_rows:
                start = self._first_rows[part]
                a = super().__getitem__(self._a_of(name))[start : start + tensor.shape[1]]
                tensor = tensor.float() @ a.float()
            found.append(tensor)
        return torch.cat(found) if len(found) > 1 else found[0]


class GPT2Weights(Weights):
    """The tensors of a GPT-2 folder under LLaMA's names: q, k, v apart, matrices ``(out, in)``.

    The causal masks that older versions stored are ignored.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        stored = [name for name in super().names() if not name.endswith(CAUSAL_MASKS)]
        self._place = {
            part: (name, index, len(parts))
            for name in stored
            for parts in [llama_parts(name)]
            for index, part in enumerate(parts)
        }

    def names(self) -> list[str]:
        """LLaMA's names of all tensors."""
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as it is here."""
        stored, _, count = self._place[name]
        shape = super().shape(stored)
        if len(shape) == 2 and CONV1D in stored:
            shape = shape[::-1]
        fits = bool(shape) and shape[0] % count == 0
        return (shape[0] // count, *shape[1:]) if fits else shape

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor, as it is here; UserError as for :class:`Weights`."""
        stored, index, count = self._place[name]
        tensor = super().__getitem__(stored)
        if tensor.dim() == 2 and CONV1D in stored:
            tensor = tensor.t()
        return tensor.chunk(count)[index].contiguous() if count > 1 else tensor.contiguous()


def read_weights(folder: Path) -> Weights:
    """The tensors of a folder under LLaMA's names, whether it is factorized or not."""
    kind = str(read_json_object(folder / CONFIG_NAME).get("model_type"))
    if kind == "gpt2":
        return GPT2Weights(folder)
    return ProductWeights(folder) if kind.startswith(FACTORIZED_PREFIX) else Weights(folder)


def _read_index(folder: Path) -> dict[str, str] | None:
    """File name by tensor, of a model in several files; None if there is one file."""
    single, path = folder / SINGLE, folder / INDEX
    if not path.exists():
        if not single.is_file():
            raise UserError(
                f"{folder}: holds no {SINGLE} (nor {INDEX}); load the model with transformers and "
                "save_pretrained it to write one"
            )
        return None
    if single.exists():
        raise UserError(
            f"{folder}: holds both {SINGLE} and {INDEX}: remove the one that is not the model's"
        )
    table = read_json_object(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path}: no index of weights; copy the folder again")
    for name, file in table.items():
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or Path(file).name != file
        ):
            shown = repr(file)[:60]
            raise UserError(
                f"{path}: puts {name[:200]} into {shown}, which is no *.safetensors file of the "
                "folder; copy the folder again"
            )
    return table


def check_weights(decoder: Decoder, weights: Weights) -> None:
    """Raise UserError unless the folder holds exactly the decoder's tensors, with its shapes.

    A tensor that the decoder does not have must repeat one that it has: a tied head, stored beside
    the embedding, or RoPE's frequencies. ``decoder`` is not sharded by tensor parallelism; it may
    be on device meta.
    """
    expected = dict(_expected_shapes(decoder, weights))
    found = {name for name in weights.names() if not name.endswith(INV_FREQ)}
    missing = sorted(expected.keys() - found)
    tied = {HEAD} if decoder.config.tie_embeddings else set()
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
    if tied & found and not torch.equal(weights[HEAD], weights[EMBEDDING]):
        raise UserError(
            f"{weights.folder}: {HEAD} differs from {EMBEDDING} although config.json says "
            "tie_word_embeddings true: set it to false to use this head, or remove the tensor"
        )
    for name in weights.names():
        if name.endswith(INV_FREQ):
            _check_frequencies(name, weights, decoder.config)


def _check_frequencies(name: str, weights: Weights, config: DecoderConfig) -> None:
    width, theta = config.rotary_width, config.rope_theta
    expected = rope_frequencies(width, theta, config.rope_scaling, torch.device("cpu")).double()
    stored = weights[name].double()
    # Half precision keeps three digits, of small numbers fewer.
    if stored.shape != expected.shape or not stored.allclose(expected, rtol=1e-2, atol=1e-7):
        scaled = " with its scaling" if config.rope_scaling is not None else ""
        raise UserError(
            f"{weights.folder}: {name} holds other frequencies than rope_theta {theta:g}{scaled} "
            "gives: correct rope_theta in config.json, or remove the tensor"
        )


def open_weights(folder: Path, sizes: DecoderConfig) -> Weights:
    """The folder's weights, checked against ``sizes`` by their headers, before memory is allocated.

    Raises:
        UserError: as :class:`Weights` and :func:`check_weights`.
    """
    weights = read_weights(folder)
    if sizes.num_layers > len(weights.names()):
        raise UserError(
            f"{folder}: config.json says {sizes.num_layers} layers, the weights are "
            f"{len(weights.names())} tensors; copy the folder again"
        )
    with torch.device("meta"):
        decoder = Decoder(sizes, DenseLinear)
    check_weights(decoder, weights)
    return weights


def _expected_shapes(decoder: Decoder, weights: Weights) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tensor in plain_tensors(decoder):
        yield name, tuple(tensor.shape)
    for layer, names in named_linears(decoder, weights):
        for index, name in enumerate(names):
            # Of matrices that are stacked in one tensor the last gives its height.
            yield f"{name}.weight", (rows_of(layer, names, index).stop, layer.shape.in_used)


def named_linears(decoder: Decoder, weights: Weights) -> list[tuple[GroupedLinear, list[str]]]:
    """The linear layers of all blocks with their matrices' names in the folder."""
    stacked = is_stacked(weights.names())
    return [
        pair
        for number, block in enumerate(decoder.blocks())
        for pair in block_linears(block, number, stacked)
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
        weight = weights[f"{name}.weight"][rows_of(layer, names, index)].to(device).float()
        try:
            stored, place = layer.layer_of(index)
            if isinstance(stored, SLTrainLinear):
                stored.load_dense_and_support(place, weight)
            else:
                layer.load_dense(index, weight)
        except torch.linalg.LinAlgError as failure:
            raise UserError(f"{weights.folder}: the SVD of {name} failed ({failure})") from failure
        difference = weight - layer.dense_weight(index).to(device)
        size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        error = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        errors[layer.shape.names[index]] = error / size if size > 0 else 0.0
    return errors
