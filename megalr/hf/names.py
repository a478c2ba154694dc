"""Correspondence between transformers' tensor names and the decoder's parameters.

All families but GPT-2 have LLaMA's names, with two differences: norms after attention and MLP
have names of their own (OLMo-2); q, k, v are one tensor, and so are gate and up (Phi-3). GPT-2 has
its own names, stores matrices transposed, and q, k, v side by side; :func:`llama_parts` says which
of LLaMA's tensors one of its tensors holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from megalr.hf.families import families_of
from megalr.layers.linear import GroupedLinear
from megalr.models.decoder import Block, Decoder

Tensors = Iterator[tuple[str, torch.Tensor]]
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
STACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
"""Tensors of Phi-3 that hold several matrices, stacked by rows, by LLaMA's names."""


GPT2 = {
    "wte": ("model.embed_tokens",),
    "wpe": ("model.embed_positions",),
    "ln_f": ("model.norm",),
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
"""Modules of GPT-2, those of a block without its prefix, and what holds their parts in LLaMA."""


def llama_parts(name: str) -> tuple[str, ...]:
    """LLaMA's names of the tensors that GPT-2's tensor ``name`` holds side by side, in order.

    ``name`` itself if it has none. GPT-2's base model alone has no prefix ``transformer.``.
    """
    module, _, kind = name.removeprefix("transformer.").rpartition(".")
    prefix = ""
    if module.startswith("h.") and module.count(".") > 1:
        _, number, module = module.split(".", 2)
        prefix = f"model.layers.{number}."
    if module not in GPT2:
        return (name,)
    return tuple(f"{prefix}{part}.{kind}" for part in GPT2[module])


def block_linears(
    block: Block, number: int, stacked: bool = False
) -> list[tuple[GroupedLinear, list[str]]]:
    """The linear layers of a block, each with the names of its matrices (without ``.weight``).

    ``stacked``: names of a model that stacks matrices; those of one tensor have the same name.
    """
    prefix = f"model.layers.{number}"
    found = []
    for layer, part, known in (
        (block.attention.qkv, "self_attn", ATTENTION),
        (block.attention.o, "self_attn", ATTENTION),
        (block.mlp.gate_up, "mlp", MLP),
        (block.mlp.down, "mlp", MLP),
    ):
        names = [known[name.rsplit(".", 1)[1]] for name in layer.shape.names]
        names = [STACKED.get(name, name) for name in names] if stacked else names
        found.append((layer, [f"{prefix}.{part}.{name}" for name in names]))
    return found


def rows_of(layer: GroupedLinear, names: list[str], index: int) -> slice:
    """Rows of matrix ``index`` of a layer in its tensor, of which ``names`` are the names."""
    used = layer.shape.out_used
    start = sum(used[i] for i in range(index) if names[i] == names[index])
    return slice(start, start + used[index])


def plain_tensors(decoder: Decoder) -> Tensors:
    """LLaMA name and tensor of everything but the block matrices, without padding, as stored.

    The tensors are views: writing to them changes the decoder.
    """
    V = decoder.config.vocab_size
    yield "model.embed_tokens.weight", decoder.embedding.weight.detach()[:V]
    if decoder.positions is not None:
        yield "model.embed_positions.weight", decoder.positions.weight.detach()
    yield from _norm_tensors("model.norm", decoder.norm)
    if not decoder.config.tie_embeddings:
        yield "lm_head.weight", decoder.head.weight.detach()[:V]
    for number, block in enumerate(decoder.blocks()):
        yield from plain_block_tensors(block, number)


def plain_block_tensors(block: Block, number: int) -> Tensors:
    """LLaMA name and tensor of a block's norms and biases, as views."""
    prefix = f"model.layers.{number}"
    first, second = "input_layernorm", "post_attention_layernorm"
    if block.post_norm:
        first, second = "post_attention_layernorm", "post_feedforward_layernorm"
    yield from _norm_tensors(f"{prefix}.{first}", block.attention_norm)
    yield from _norm_tensors(f"{prefix}.{second}", block.mlp_norm)
    for name, norm in (("q_norm", block.attention.q_norm), ("k_norm", block.attention.k_norm)):
        if norm is not None:
            yield f"{prefix}.self_attn.{name}.weight", norm.weight.detach()
    for layer, names in block_linears(block, number):
        if layer.bias is not None:
            for index, name in enumerate(names):
                yield f"{name}.bias", layer.bias.detach()[layer.used_rows(index)]


def _norm_tensors(name: str, norm: torch.nn.Module) -> Tensors:
    for key, parameter in norm.named_parameters():
        yield f"{name}.{key}", parameter.detach()


def dense_tensors(decoder: Decoder, family: str | None = None) -> Tensors:
    """Name and tensor of every weight of the transformers model, dense, without padding, float32.

    Factors are multiplied out in float32, one matrix at a time as the iterator advances.
    ``family``: one of ``families_of(decoder.config)``; None: the first.

    Raises:
        UserError: no transformers architecture computes this decoder's function.
    """
    chosen = family or families_of(decoder.config)[0]
    yield from other_tensors(decoder, chosen)
    for number, block in enumerate(decoder.blocks()):
        for name, layer, indices in block_modules(block, number, chosen):
            yield f"{name}.weight", dense_module_weight(layer, indices, chosen)


def dense_module_weight(layer: GroupedLinear, indices: list[int], family: str) -> torch.Tensor:
    """The dense weight of a transformers module that holds these matrices of a layer, float32."""
    stack = torch.cat([layer.dense_weight(index) for index in indices])
    return stack.t().contiguous() if family == "gpt2" else stack  # Conv1D stores (in, out)


def other_tensors(decoder: Decoder, family: str) -> Tensors:
    """Name and tensor of everything but the block matrices, without padding, float32."""
    if family == "gpt2":
        yield from _gpt2_other_tensors(decoder)
        return
    for name, tensor in plain_tensors(decoder):
        yield name, tensor.float()
    if family == "llama" and decoder.config.attention_bias and not decoder.config.output_bias:
        for number in range(decoder.config.num_layers):
            zero = torch.zeros(decoder.config.hidden_size)
            yield f"model.layers.{number}.self_attn.o_proj.bias", zero


def block_modules(
    block: Block, number: int, family: str
) -> Iterator[tuple[str, GroupedLinear, list[int]]]:
    """Name of every linear module of a block in transformers, our layer, its matrices in there."""
    if family == "gpt2":
        for name, layer in _gpt2_linears(block):
            yield f"transformer.h.{number}.{name}", layer, list(range(len(layer.shape.names)))
        return
    for layer, names in block_linears(block, number, stacked=family == "phi3"):
        for name in dict.fromkeys(names):
            yield name, layer, [index for index, own in enumerate(names) if own == name]


def _gpt2_linears(block: Block) -> list[tuple[str, GroupedLinear]]:
    return [
        ("attn.c_attn", block.attention.qkv),
        ("attn.c_proj", block.attention.o),
        ("mlp.c_fc", block.mlp.gate_up),
        ("mlp.c_proj", block.mlp.down),
    ]


def _gpt2_other_tensors(decoder: Decoder) -> Tensors:
    V = decoder.config.vocab_size
    yield "transformer.wte.weight", decoder.embedding.weight.detach()[:V].float()
    if decoder.positions is not None:
        yield "transformer.wpe.weight", decoder.positions.weight.detach().float()
    yield from _float32("transformer.ln_f", decoder.norm)
    if not decoder.config.tie_embeddings:
        yield "lm_head.weight", decoder.head.weight.detach()[:V].float()
    for number, block in enumerate(decoder.blocks()):
        prefix = f"transformer.h.{number}"
        yield from _float32(f"{prefix}.ln_1", block.attention_norm)
        yield from _float32(f"{prefix}.ln_2", block.mlp_norm)
        for name, layer in _gpt2_linears(block):
            if layer.bias is not None:
                count = len(layer.shape.names)
                used = [layer.bias.detach()[layer.used_rows(index)] for index in range(count)]
                yield f"{prefix}.{name}.bias", torch.cat(used).float()


def _float32(name: str, norm: torch.nn.Module) -> Tensors:
    return ((key, tensor.float()) for key, tensor in _norm_tensors(name, norm))


def dense_state_dict(decoder: Decoder) -> dict[str, torch.Tensor]:
    """All of :func:`dense_tensors` at once."""
    return dict(dense_tensors(decoder))


@torch.no_grad()
def load_dense_state_dict(decoder: Decoder, state: Mapping[str, torch.Tensor]) -> None:
    """Load all weights from a dense state dict with transformers' names (not GPT-2's).

    Dense layers take the matrices exactly, factorized ones their best rank-r approximation.
    """
    for name, tensor in plain_tensors(decoder):
        tensor.copy_(state[name])
    stacked = is_stacked(state)
    for number, block in enumerate(decoder.blocks()):
        for layer, names in block_linears(block, number, stacked):
            for index, name in enumerate(names):
                layer.load_dense(index, state[f"{name}.weight"][rows_of(layer, names, index)])


def is_stacked(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold several matrices each."""
    return any(name.endswith(".qkv_proj.weight") for name in names)
