"""A decoder's factors under the names of ``modeling_factorized``, and the settings beside them."""

from __future__ import annotations

from typing import Any

import torch

from megalr.hf.modeling_factorized import FACTORIZED, SHARED_INPUT
from megalr.hf.names import Tensors, block_modules, dense_module_weight, other_tensors
from megalr.layers.linear import FactorizedLinear, GroupedLinear
from megalr.models.decoder import Decoder

LOWEST_TRANSFORMERS = "5.0.0"
"""Oldest version of transformers with which factorized folders were tried."""


def factorization(decoder: Decoder, family: str, shared: bool = True) -> dict[str, Any]:
    """``factorization`` of config.json for a decoder with factors.

    Args:
        decoder: not sharded by tensor parallelism.
        family: one of ``families_of(decoder.config)``.
        shared: whether factors A of layers with one input become one matrix, where the form
            allows it.
    """
    modules: dict[str, Any] = {}
    form = "product"
    for name, layer, indices in block_modules(decoder.blocks()[0], 0, family):
        stored_in, _ = layer.layer_of(indices[0])
        if isinstance(stored_in, FactorizedLinear):
            form = stored_in.form
            stored = [layer.stored_matrix(index) for index in indices]
            modules[_in_block(name)] = {"rank": _ranks(decoder, family, _in_block(name))}
            if "values" in stored[0]:
                modules[_in_block(name)]["entries"] = sum(len(each["values"]) for each in stored)
    return {
        "form": form,
        "modules": modules,
        "shared": shared and family != "gpt2" and form in ("product", "silu"),
        "transformers": LOWEST_TRANSFORMERS,
    }


def _ranks(decoder: Decoder, family: str, module: str) -> Any:
    """``rank`` of a module, as short as the ranks of its matrices in all blocks allow."""
    ranks: list[Any] = []
    for number, block in enumerate(decoder.blocks()):
        for name, layer, indices in block_modules(block, number, family):
            if _in_block(name) == module:
                found = [_rank_of(layer, index) for index in indices]
                ranks.append(found if len(set(found)) > 1 else found[0])
    same = not isinstance(ranks[0], list) and all(each == ranks[0] for each in ranks)
    return ranks[0] if same else ranks


def _rank_of(layer: GroupedLinear, index: int) -> int:
    stored_in, _ = layer.layer_of(index)
    return stored_in.rank if isinstance(stored_in, FactorizedLinear) else 0


def auto_map(family: str) -> dict[str, str]:
    """``auto_map`` of config.json: the classes in the folder's copy of ``modeling_factorized``."""
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    names = [f"modeling_factorized.{cls.__name__}" for cls in FACTORIZED[family]]
    return dict(zip(autos, names, strict=True))


def factorized_tensors(decoder: Decoder, family: str, settings: dict[str, Any]) -> Tensors:
    """Name and tensor of every weight of the model with ``settings``, without padding, float32.

    Positions of sparse entries are int32. ``settings``: of :func:`factorization`.
    """
    modules = settings["modules"]
    for name, tensor in other_tensors(decoder, family):
        module, _, last = name.rpartition(".")
        if last == "bias" and _in_block(module) in modules:
            yield from _biases(module, tensor)
        else:
            yield name, tensor
    for number, block in enumerate(decoder.blocks()):
        shared: dict[str, list[torch.Tensor]] = {}
        for name, layer, indices in block_modules(block, number, family):
            if _in_block(name) not in modules:
                yield f"{name}.weight", dense_module_weight(layer, indices, family)
                continue
            parent, _, leaf = name.rpartition(".")
            leaves = SHARED_INPUT.get(parent.rpartition(".")[2], ())
            to_parent = settings["shared"] and leaf in leaves
            for key, tensor in _module_tensors(layer, indices):
                if to_parent and key == "a.weight":
                    shared.setdefault(f"{parent}.shared_a.weight", []).append(tensor)
                else:
                    yield f"{name}.{key}", tensor
        for name, parts in shared.items():
            yield name, torch.cat(parts)


def _in_block(name: str) -> str:
    """``model.layers.3.mlp.up_proj`` to ``mlp.up_proj``."""
    return ".".join(name.split(".")[-2:])


def _biases(module: str, bias: torch.Tensor) -> Tensors:
    """The bias of a module, which its factor B has."""
    if not module.endswith("c_attn"):
        yield f"{module}.b.bias", bias
        return
    for index, part in enumerate(bias.chunk(3)):
        yield f"{module}.b.{index}.bias", part


def _module_tensors(layer: GroupedLinear, indices: list[int]) -> Tensors:
    """The tensors of a Projection that holds these matrices of a layer."""
    stored = [layer.stored_matrix(index) for index in indices]
    yield "a.weight", torch.cat([each["a"] for each in stored])
    for index, each in zip(indices, stored, strict=True):
        yield ("b.weight" if len(indices) == 1 else f"b.{index}.weight"), each["b"]
    if "base" in stored[0]:
        yield "base.weight", torch.cat([each["base"] for each in stored])
    if "values" in stored[0]:
        yield "sparse.values", torch.cat([each["values"] for each in stored])
        rows, positions = 0, []
        for each in stored:
            positions.append(each["positions"] + rows * each["a"].shape[1])
            rows += each["b"].shape[0]
        yield "sparse.positions", torch.cat(positions).int()
