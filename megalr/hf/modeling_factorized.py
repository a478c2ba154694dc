"""Language models with factorized matrices, as transformers' own architectures.

The file imports torch and transformers only: an exported folder holds a copy of it, which
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` runs.

A model is transformers' model of its family; the linear layers that config.json lists under
``factorization`` are replaced. Attention, cache, generation and checkpointing stay transformers'.

``factorization`` holds: ``form``, one of FORMS; ``modules``, for each replaced layer its ``rank``
and, for form ``sparse``, the number ``entries`` of S; ``shared``, whether the factors A of layers
with one input are one matrix; ``transformers``, the lowest version. ``rank`` is a number, or a list
with an item for each block: a number, or a list with one for each of the matrices that a layer
holds side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)
from transformers.pytorch_utils import Conv1D

FORMS = ("product", "silu", "sparse", "base")
"""``y = B A x``; ``B silu(A x)``; ``(B A + S) x`` with sparse S; ``(W0 + B A) x``. Any scale of the
product is in B."""

SHARED_INPUT = {
    "self_attn": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj"),
}
"""Layers of a block that read one input."""


class SparseEntries(nn.Module):
    """``x S^T`` for a sparse S ``(rows, columns)``.

    Parameter ``values (count,)`` and buffer ``positions (count,)`` int32, each row * columns +
    column.
    """

    positions: torch.Tensor

    def __init__(self, rows: int, columns: int, count: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.values = nn.Parameter(torch.zeros(count))
        spread = torch.arange(count) * (rows * columns) // max(1, count)
        self.register_buffer("positions", spread.int())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., columns)`` to ``(..., rows)``.

        For few tokens the entries are gathered and summed in float32. For many, which would take
        more memory than S as a dense matrix, S is filled in and multiplied.
        """
        flat = x.reshape(-1, self.columns)  # (N, columns)
        if flat.shape[0] * self.values.numel() <= self.rows * self.columns:
            row, column = self.positions // self.columns, self.positions % self.columns
            terms = flat[:, column].float() * self.values.float()  # (N, count)
            y = terms.new_zeros(flat.shape[0], self.rows).index_add(1, row, terms).to(x.dtype)
        else:
            dense = self.values.new_zeros(self.rows * self.columns)
            dense = dense.index_add(0, self.positions, self.values)
            y = F.linear(flat, dense.view(self.rows, self.columns))
        return y.view(*x.shape[:-1], self.rows)


class Projection(nn.Module):
    """A linear layer in one of FORMS: ``x (..., n)`` to ``(..., sum m_i)``.

    Modules: ``a``, all A_i stacked, ``(sum r_i, n)``; ``b``, B ``(m, r)`` with the bias, or a list
    of the B_i if several matrices are side by side (q, k, v of GPT-2 and Phi-3); ``sparse``: S;
    ``base``: W0.

    Args:
        old: the layer that is replaced, which has the sizes.
        form: one of FORMS.
        ranks: r_i of each matrix.
        parts: outputs m_i of the matrices side by side.
        entries: numbers in S.
    """

    def __init__(
        self, old: Any, form: str, ranks: list[int], parts: tuple[int, ...], entries: int
    ) -> None:
        super().__init__()
        n, m = _sizes(old)
        bias = old.bias is not None
        self.silu = form == "silu"
        self.ranks = ranks
        self.a = nn.Linear(n, sum(ranks), bias=False)
        pairs = zip(ranks, parts, strict=True)
        blocks = [nn.Linear(rank, part, bias=bias) for rank, part in pairs]
        self.b: Any = blocks[0] if len(parts) == 1 else nn.ModuleList(blocks)
        self.sparse = SparseEntries(m, n, entries) if form == "sparse" else None
        self.base = nn.Linear(n, m, bias=False) if form == "base" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., n)`` to ``(..., sum m_i)``."""
        h = self.a(x)  # (..., sum r_i)
        h = F.silu(h) if self.silu else h
        if isinstance(self.b, nn.ModuleList):
            pairs = zip(self.b, h.split(self.ranks, dim=-1), strict=True)
            y = torch.cat([b(part) for b, part in pairs], dim=-1)
        else:
            y = self.b(h)
        for rest in (self.sparse, self.base):
            y = y if rest is None else y + rest(x)
        return y


class SharedProjection(nn.Module):
    """The factor B of a layer whose A is part of its parent's ``shared_a``; forms product, silu.

    Args:
        old: the layer that is replaced.
        form: ``product`` or ``silu``.
        start: first of this layer's r columns in the output of ``shared_a``.
        rank: r.
    """

    def __init__(self, old: Any, form: str, start: int, rank: int) -> None:
        super().__init__()
        self.silu = form == "silu"
        self.start, self.stop = start, start + rank
        self.b = nn.Linear(rank, _sizes(old)[1], bias=old.bias is not None)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """``h (..., all ranks)``, the output of ``shared_a``, to ``(..., m)``."""
        h = h[..., self.start : self.stop]
        return self.b(F.silu(h) if self.silu else h)


def _apply_shared_a(module: Any, args: Any, kwargs: Any) -> Any:
    """Before attention or MLP: its input becomes ``A x`` of all layers that read it."""
    if args:
        return (module.shared_a(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": module.shared_a(kwargs["hidden_states"])}


def _sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a Linear or of GPT-2's Conv1D."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def check_config(config: Any) -> dict[str, Any]:
    """``config.factorization``, checked as far as it can be without the model.

    Raises:
        ValueError: in one line: missing or malformed, for another version, or quantized.
    """
    settings = getattr(config, "factorization", None)
    if not isinstance(settings, dict) or not isinstance(settings.get("modules"), dict):
        raise ValueError(
            "config.json has no factorization with modules: it is not of a factorized model; "
            "export the run again"
        )
    lowest = str(settings.get("transformers", "0"))
    if Version(transformers.__version__) < Version(lowest):
        raise ValueError(
            f"this model needs transformers {lowest} or later, not {transformers.__version__}: "
            "pip install --upgrade transformers"
        )
    form = settings.get("form")
    if form not in FORMS or (settings.get("shared") and form not in ("product", "silu")):
        raise ValueError(
            f"config.json: factorization.form {form!r} with shared {settings.get('shared')!r}: "
            f"must be one of {', '.join(FORMS)}, shared for the first two only"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "factors cannot be quantized, their errors would multiply: quantize a dense export"
        )
    return settings


@dataclass
class ListedLayer:
    """A linear layer of a block that ``factorization.modules`` lists, and what it says of it."""

    parent: Any
    leaf: str
    old: Any
    parts: tuple[int, ...]
    ranks: list[int]
    entries: int

    def replace(self, new: nn.Module) -> None:
        """Put another layer in its place."""
        setattr(self.parent, self.leaf, new)


def factorize(base: Any, config: Any) -> None:
    """Replace the linear layers of a base model that ``config.factorization`` lists.

    Raises:
        ValueError: in one line: the settings do not fit the model.
    """
    settings = check_config(config)
    form = settings["form"]
    blocks = base.h if isinstance(base, GPT2Model) else base.layers
    for number, block in enumerate(blocks):
        layers = {
            name: _listed_layer(block, name, values, form, (number, len(blocks)))
            for name, values in settings["modules"].items()
        }
        if settings.get("shared"):
            _share_factors(block, layers, form)
        for layer in layers.values():
            layer.replace(Projection(layer.old, form, layer.ranks, layer.parts, layer.entries))


def _listed_layer(
    block: Any, name: str, values: Any, form: str, place: tuple[int, int]
) -> ListedLayer:
    parent_name, _, leaf = name.partition(".")
    parent = getattr(block, parent_name, None)
    old = getattr(parent, leaf, None)
    if not isinstance(old, nn.Linear | Conv1D):
        raise ValueError(
            f"config.json: factorization.modules names {name!r:.60}, which is no linear layer of a "
            f"{type(block).__name__}"
        )
    n, m = _sizes(old)
    parts = _parts(parent, leaf, m)
    values = values if isinstance(values, dict) else {}
    ranks = _ranks(values.get("rank"), len(parts), place)
    sides = [min(n, part) for part in parts]
    _check_numbers(name, "rank", values.get("rank"), ranks, sides)
    entries = values.get("entries")
    if form == "sparse":
        _check_numbers(name, "entries", entries, [entries], [n * m])
    return ListedLayer(parent, leaf, old, parts, ranks, entries if form == "sparse" else 0)


def _ranks(given: Any, parts: int, place: tuple[int, int]) -> list[Any]:
    """The ranks of the matrices of a layer of block ``place[0]`` of ``place[1]``."""
    number, blocks = place
    if isinstance(given, list):
        given = given[number] if len(given) == blocks else None
    return given if isinstance(given, list) else [given] * parts


def _check_numbers(name: str, key: str, given: Any, numbers: list[Any], most: list[int]) -> None:
    fitting = len(numbers) == len(most) and all(
        type(number) is int and 1 <= number <= limit
        for number, limit in zip(numbers, most, strict=True)
    )
    if not fitting:
        raise ValueError(
            f"config.json: factorization.modules {name} has {key} {given!r:.40}: "
            f"must be 1 to {min(most)}"
        )


def _parts(parent: Any, leaf: str, m: int) -> tuple[int, ...]:
    """Outputs of the matrices that a layer with m outputs holds side by side."""
    if leaf == "qkv_proj":  # of Phi-3, where k and v may have fewer heads
        kv = parent.num_key_value_heads * parent.head_dim
        return m - 2 * kv, kv, kv
    count = {"c_attn": 3, "gate_up_proj": 2}.get(leaf, 1)
    return (m // count,) * count


def _share_factors(block: Any, layers: dict[str, ListedLayer], form: str) -> None:
    """Replace the layers of one input, with one matrix ``shared_a (sum r_i, n)`` in their parent.

    They are taken out of ``layers``. A parent whose layers are not all listed is left as it is.
    """
    for parent_name, leaves in SHARED_INPUT.items():
        names = [f"{parent_name}.{leaf}" for leaf in leaves]
        if not all(name in layers for name in names):
            continue
        parent, width = getattr(block, parent_name), 0
        inputs = _sizes(layers[names[0]].old)[0]
        for layer in map(layers.pop, names):
            layer.replace(SharedProjection(layer.old, form, width, layer.ranks[0]))
            width += layer.ranks[0]
        parent.shared_a = nn.Linear(inputs, width, bias=False)
        parent.register_forward_pre_hook(_apply_shared_a, with_kwargs=True)


class FactorizedModel:
    """What all classes below add to transformers' class of their family."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        factorize(self.base_model, config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]  # initializes the new layers

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but tensors of another shape, missing or unknown, are an error.

        Raises:
            ValueError: in one line, as ``check_config``, or the first such tensor.
        """
        with_info = kwargs.pop("output_loading_info", False)
        tolerant = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        problems = [
            f"{name} has shape {tuple(stored)}, config.json says {tuple(expected)}"
            for name, stored, expected in sorted(info["mismatched_keys"])
            if not tolerant
        ]
        problems += [f"{name} is missing from the weights" for name in sorted(info["missing_keys"])]
        unknown = set(info["unexpected_keys"]) - {"lm_head.weight"}  # a base model has no head
        problems += [f"{name} is not in the model of config.json" for name in sorted(unknown)]
        if problems:
            raise ValueError(
                f"{problems[0]}: the files of the folder do not belong together; copy or export it "
                "again"
            )
        return (model, info) if with_info else model


def _classes(family: str, config: type, model: type, causal: type) -> tuple[type, type, type]:
    """The family's configuration, base model and causal language model with factors."""
    name = f"Megalr{config.__name__.removesuffix('Config')}"
    own: dict[str, Any] = {
        "__module__": __name__,
        "_tp_plan": None,
    }  # the plans name layers that are replaced
    settings = {"model_type": f"megalr_{family}", "base_model_tp_plan": None}
    new_config = type(f"{name}Config", (config,), {**own, **settings, "_auto_class": "AutoConfig"})
    own["config_class"] = new_config
    bodies = {"Model": (model, "AutoModel"), "ForCausalLM": (causal, "AutoModelForCausalLM")}
    new_model, new_causal = (
        type(f"{name}{suffix}", (FactorizedModel, base), {**own, "_auto_class": auto})
        for suffix, (base, auto) in bodies.items()
    )
    return new_config, new_model, new_causal


TRANSFORMERS = {
    "llama": (LlamaConfig, LlamaModel, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralModel, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2Model, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3Model, Qwen3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3Model, SmolLM3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2Model, Olmo2ForCausalLM),
    "phi3": (Phi3Config, Phi3Model, Phi3ForCausalLM),
    "gpt2": (GPT2Config, GPT2Model, GPT2LMHeadModel),
}
"""transformers' configuration, base model and causal language model of each family."""

FACTORIZED = {family: _classes(family, *classes) for family, classes in TRANSFORMERS.items()}
"""The same with factors: MegalrLlamaConfig, MegalrLlamaModel, MegalrLlamaForCausalLM, ..."""

# transformers finds the classes of a folder by their names in the module.
globals().update({cls.__name__: cls for classes in FACTORIZED.values() for cls in classes})
