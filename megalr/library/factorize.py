"""Replace linears of a model by factorized layers, and put plain linears back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megalr.errors import UserError
from megalr.layers.linear import FactorizedLinear
from megalr.library.linears import (
    INITS,
    FactorLinear,
    LibraryLinear,
    SparseFactorLinear,
    is_conv1d,
    make_linear,
    size_of,
)
from megalr.models.ranks import is_named

SHOWN = 8
"""Names listed in an error."""


@torch.no_grad()
def factorize_(
    model: nn.Module,
    *,
    rank: int,
    targets: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    density: float | None = None,
    alpha: float = 32.0,
    init: str = "svd",
    init_std: float = 0.02,
    seed: int = 0,
) -> nn.Module:
    """Replace linears ``y = x W^T + bias`` of ``model`` by ``W = (alpha/r) B A (+ S)``, in place.

    Call it before the optimizer is built and before DDP, ``fully_shard`` or ``torch.compile``. A
    layer keeps its name, dtype, device, bias and mode; its parameters are ``a (r, n)``,
    ``b (m, r)`` and, with ``density``, ``values`` (docs/library.md).

    Args:
        model: any module; ``nn.Linear`` and GPT-2's ``Conv1D`` inside it can be replaced.
        rank: r, from 1 to the smaller side of every target.
        targets: names of linears: a full name, its last parts ("q_proj", "mlp.up"), or a pattern
            with ``*`` for the full name. None: all linears except the model's output head.
        exclude: targets to leave as they are, named likewise.
        density: share of the entries of W in a sparse part S on a random support (SLTrain); None:
            factors only.
        alpha: numerator of the scale alpha / r. It scales the gradients of both factors as well.
        init: "svd": the best approximation of W of rank r, balanced; with ``density`` S is the
            rest on its support. For pretraining from scratch: "kaiming", "full_rank_variance" or
            "orthogonal", the draws of docs/methods/factorized.md (SLTrain has one draw of its own).
        init_std: standard deviation of W's entries for "full_rank_variance".
        seed: of draws and supports, which depend on it and on the linear's name only.

    Returns:
        The model itself.

    Raises:
        UserError: no linear, or none that ``targets`` names; a rank beyond a matrix; a tied,
            quantized or otherwise special linear; a model that is wrapped already. Nothing is
            changed then.
    """
    if init not in INITS:
        raise UserError(f"init = {init!r}: must be one of {', '.join(INITS)}")
    if density is not None and not 0 < density < 1:
        raise UserError(f"density = {density}: must be above 0 and below 1")
    if density is not None and init in ("full_rank_variance", "orthogonal"):
        raise UserError(f"init = {init} has no sparse part: use svd or kaiming")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError("the model is wrapped by DDP already: call factorize_ before that")
    linears = select_linears(model, targets, exclude)
    _check_ranks(linears, rank)
    for name, linear in linears.items():
        _check_linear(model, name, linear)
    _check_untied(model, linears)
    layers: dict[nn.Module, nn.Module] = {}
    for name, linear in linears.items():
        layer = make_linear(linear, name, rank, alpha=alpha, density=density, init=init, seed=seed)
        if init == "svd":
            weight: Any = linear.weight
            layer.load_dense(0, weight.mT if layer.transposed else weight)
        else:
            layer.reset_parameters(seed, init_std)
        layers[linear] = layer
    _replace(model, layers)
    return model


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Replace every factorized layer by a linear with ``W = (alpha/r) B A (+ S)``, in place.

    The inverse of :func:`factorize_`: names, biases, dtype and kinds of linears are those before
    it. W is multiplied in float32 and rounded once. Returns the model.

    Raises:
        UserError: no factorized layer, or one whose factors are sharded.
    """
    layers = factorized_layers(model)
    if not layers:
        raise UserError("merge_: the model has no layers of factorize_")
    for name, layer in layers.items():
        if isinstance(layer.a, DTensor):
            raise UserError(
                f"merge_: {name} is sharded over ranks: load a full state dict into a factorized "
                "model on one process and merge that"
            )
    linears: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        weight = layer.dense_weight(0).to(layer.a.dtype)  # (m, n)
        linear = _plain_linear(layer)
        stored = weight.mT.contiguous() if layer.transposed else weight
        linear.weight = nn.Parameter(stored, requires_grad=layer.a.requires_grad)
        linear.bias = layer.bias
        linears[layer] = linear.train(layer.training)
    _replace(model, linears)
    return model


def factorized_layers(model: nn.Module) -> dict[str, LibraryLinear]:
    """The layers that :func:`factorize_` made, by name."""
    kinds = (FactorLinear, SparseFactorLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def split_parameters(
    model: nn.Module, targets: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters as (matrices, others), for optimizers that treat matrices specially.

    ``matrices``: the factors A and B of factorized layers and the weights of linears, of those
    that ``targets`` and ``exclude`` name as in :func:`factorize_`. Call it after ``fully_shard``.

    Raises:
        UserError: there are neither factorized layers nor linears of these names.
    """
    chosen: dict[Any, None] = {}
    for layer in select_linears(model, targets, exclude, factorized=True).values():
        if isinstance(layer, FactorizedLinear):
            layer.mark_factors()
            chosen |= dict.fromkeys((layer.a, layer.b))
        else:
            chosen[layer.weight] = None
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if p in chosen], [p for p in trained if p not in chosen]


# -- which linears -------------------------------------------------------------------------


def select_linears(
    model: nn.Module,
    targets: Iterable[str] | None,
    exclude: Iterable[str],
    factorized: bool = False,
) -> dict[str, nn.Module]:
    """The linears that ``targets`` names and ``exclude`` does not, by full name, each once.

    ``factorized``: the factorized layers of these names as well.

    Raises:
        UserError: there are none, or none of one of the names.
    """
    patterns = None if targets is None else _words("targets", targets)
    left, found = _words("exclude", exclude), _linears(model, factorized)
    for word in [*(patterns or ()), *left]:
        if not any(is_named(name, word) for name in found):
            raise UserError(_nothing_named(model, word, found))
    head = _output_head(model) if patterns is None else None
    selected = {
        name: module
        for name, module in found.items()
        if module is not head
        and (patterns is None or any(is_named(name, word) for word in patterns))
        and not any(is_named(name, word) for word in left)
    }
    if not selected:
        raise UserError(_nothing_named(model, None, found))
    return selected


def _words(argument: str, given: Iterable[str]) -> list[str]:
    if isinstance(given, str):
        raise UserError(f"{argument} = {given!r}: must be a list of names, such as [{given!r}]")
    return list(given)


def _linears(model: nn.Module, factorized: bool) -> dict[str, nn.Module]:
    """Everything that calls itself a linear, quantized ones included, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or is_conv1d(module)
        or (factorized if isinstance(module, FactorizedLinear) else _looks_linear(module))
    }


def _looks_linear(module: nn.Module) -> bool:
    named = "linear" in type(module).__name__.lower()
    return named and hasattr(module, "in_features") and hasattr(module, "out_features")


def _output_head(model: nn.Module) -> Any:
    """The head of a transformers model; None for others."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _nothing_named(model: nn.Module, word: str | None, found: dict[str, nn.Module]) -> str:
    if not found:
        return f"the model {type(model).__name__} has no linear layers to factorize"
    wanted = "no linear is left" if word is None else f"no linear is named {word}"
    return f"{wanted}: the model has {_listed(list(found))}"


def _listed(names: list[str]) -> str:
    """The kinds of names, numbers as ``*``, bounded in length."""
    kinds = list(dict.fromkeys(_pattern(name) for name in names))
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return ", ".join(kinds[:SHOWN]) + more


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


# -- what may be replaced ------------------------------------------------------------------


def _check_ranks(linears: dict[str, nn.Module], rank: int) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"rank = {rank!r}: must be an integer from 1")
    for name, module in linears.items():
        m, n = size_of(module)
        if rank > min(m, n):
            raise UserError(
                f"rank = {rank}: {name} is {m} x {n}, so its rank is at most {min(m, n)}: lower "
                "rank, or leave the layer out with exclude"
            )


def _check_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise UserError for a linear whose weight is not a plain matrix of its own."""
    if model is module:
        raise UserError("the model is itself a linear: put it into a module, nn.Sequential(linear)")
    weight: Any = module._parameters.get("weight")
    if isinstance(weight, DTensor):
        raise UserError(f"{name} is sharded already: call factorize_ before fully_shard")
    kind = type(module)
    plain = is_conv1d(module) or kind.forward is nn.Linear.forward
    quantized = weight is None or not weight.is_floating_point()
    if not plain or quantized or type(weight) not in (nn.Parameter, Tensor):
        what = f"a {kind.__module__}.{kind.__qualname__}"
        raise UserError(
            f"{name} is {what}{' with no floating-point weight' if quantized else ''}: quantized "
            "and special linears cannot be factorized; load the model without quantization, or "
            "leave the layer out with exclude"
        )
    if weight.is_meta:
        raise UserError(f"{name} has no values yet (meta device): create the model on a device")
    if module._forward_hooks or module._forward_pre_hooks:
        raise UserError(f"{name} has forward hooks, which its replacement would not call")


def _check_untied(model: nn.Module, linears: dict[str, nn.Module]) -> None:
    """Raise UserError for a weight that another module uses as well; sharing a module is fine."""
    targets = {id(module): name for name, module in linears.items()}
    weights: dict[int, str] = {id(module.weight): name for name, module in linears.items()}
    for place, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = weights.get(id(parameter))
            if name is not None and targets.get(id(module)) != name:
                raise UserError(
                    f"{name}.weight is tied to {place}.{leaf}: factors would untie it; leave the "
                    "layer out with exclude"
                )


# -- replacing -----------------------------------------------------------------------------


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put new modules wherever the old ones are; a module may be used in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def _plain_linear(layer: LibraryLinear) -> Any:
    """An empty linear of the kind that was replaced."""
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(layer.out_features, layer.in_features).to(layer.a.device)
    return nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
