"""The decoder is specified by transformers: same weights, same logits, loss and gradients."""

from __future__ import annotations

import pytest
import torch
import transformers

from megalr.hf.names import dense_state_dict, load_dense_state_dict
from megalr.models.build import build_decoder
from megalr.models.config import DecoderConfig
from tests.models.settings import full_rank, low_rank, tiny

FAMILIES = {
    "llama": ({}, "LlamaConfig", {}),
    "llama_mha_tied": ({"num_kv_heads": None, "tie_embeddings": True}, "LlamaConfig", {}),
    "mistral_window": (
        {"sliding_window": 5, "rope_theta": 1e6},
        "MistralConfig",
        {"sliding_window": 5},
    ),
    "qwen2_bias": (
        {"attention_bias": True, "tie_embeddings": True},
        "Qwen2Config",
        {"use_sliding_window": False},
    ),
}


def reference_model(config: DecoderConfig, kind: str, extra: dict) -> transformers.PreTrainedModel:
    """A transformers model of these sizes with no trivial weight."""
    settings = getattr(transformers, kind)(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=64,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
        **extra,
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(settings).float().eval()
    for parameter in model.parameters():  # biases and norms at their trivial init prove nothing
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_equal_transformers(family: str) -> None:
    changes, kind, extra = FAMILIES[family]
    config = tiny(**changes)
    reference = reference_model(config, kind, extra)
    decoder = build_decoder(config, full_rank(), seed=0)
    load_dense_state_dict(decoder, reference.state_dict())

    ids = torch.randint(0, config.vocab_size, (3, 17))
    ids[0, 10:] = 0
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[0, 9:] = -100
    expected_logits = reference(ids).logits
    torch.testing.assert_close(decoder(ids), expected_logits, atol=1e-5, rtol=1e-5)

    expected = torch.nn.functional.cross_entropy(
        expected_logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    loss = decoder(ids, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)

    expected.backward()
    loss.backward()
    gradients = build_decoder(config, full_rank(), seed=0)
    for target, source in zip(gradients.parameters(), decoder.parameters(), strict=True):
        target.data.copy_(source.grad)
    ours = dense_state_dict(gradients)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_low_rank_model_equals_the_dense_model_with_the_product_of_its_factors() -> None:
    config = tiny()
    factorized = build_decoder(config, low_rank(), seed=3)
    dense = build_decoder(config, full_rank(), seed=4)
    load_dense_state_dict(dense, dense_state_dict(factorized))
    ids = torch.randint(0, config.vocab_size, (2, 9))
    torch.testing.assert_close(factorized(ids), dense(ids), atol=1e-5, rtol=1e-5)


def test_gpt2_family_equals_transformers() -> None:
    config = tiny(
        num_kv_heads=None,
        intermediate_size=192,
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        max_positions=32,
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        tie_embeddings=True,
    )
    settings = transformers.GPT2Config(
        vocab_size=config.vocab_size, n_embd=48, n_layer=2, n_head=6, n_positions=32
    )
    torch.manual_seed(2)
    reference = transformers.GPT2LMHeadModel(settings).float().eval()
    for parameter in reference.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    decoder = build_decoder(config, full_rank(), seed=0)
    state = reference.state_dict()
    with torch.no_grad():
        decoder.embedding.weight[: config.vocab_size] = state["transformer.wte.weight"]
        decoder.positions.weight.copy_(state["transformer.wpe.weight"])
        decoder.norm.load_state_dict(
            {k: state[f"transformer.ln_f.{k}"] for k in ("weight", "bias")}
        )
        for i, block in enumerate(decoder.layers):
            p = f"transformer.h.{i}"
            for norm, name in ((block.attention_norm, "ln_1"), (block.mlp_norm, "ln_2")):
                norm.load_state_dict({k: state[f"{p}.{name}.{k}"] for k in ("weight", "bias")})
            for linear, name in (
                (block.attention.qkv, "attn.c_attn"),
                (block.attention.o, "attn.c_proj"),
                (block.mlp.gate_up, "mlp.c_fc"),
                (block.mlp.down, "mlp.c_proj"),
            ):
                linear.weight.copy_(state[f"{p}.{name}.weight"].t())  # Conv1D stores (in, out)
                linear.bias.copy_(state[f"{p}.{name}.bias"])
    ids = torch.randint(0, config.vocab_size, (2, 11))
    torch.testing.assert_close(decoder(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)
