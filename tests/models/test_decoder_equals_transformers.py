"""The decoder is specified by transformers: same weights, same logits, loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

from megalr.config.model import RopeScaling
from megalr.hf.names import dense_state_dict, load_dense_state_dict
from megalr.models.build import build_decoder, build_model
from megalr.models.config import DecoderConfig
from megalr.models.decoder import Decoder
from megalr.models.flops import parameter_count
from tests.models.settings import full_rank, low_rank, run_of, tiny

LLAMA3 = RopeScaling(
    type="llama3",
    factor=8.0,
    original_max_positions=512,  # of the four wavelengths one is kept, one mixed, two stretched
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
LLAMA3_THERE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = RopeScaling(type="yarn", factor=4.0, original_max_positions=64)
YARN_THERE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FULL, SLIDING = "full_attention", "sliding_attention"

FAMILIES = {
    "llama": ({}, "LlamaConfig", {}),
    "llama_mha_tied": ({"num_kv_heads": None, "tie_embeddings": True}, "LlamaConfig", {}),
    "llama_3.2": (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_embeddings": True, "norm_eps": 1e-5},
        "LlamaConfig",
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_THERE}},
    ),
    "llama_linear": (
        {"rope_scaling": RopeScaling(type="linear", factor=3.0)},
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "mistral_window": (
        {"sliding_window": 5, "rope_theta": 1e6},
        "MistralConfig",
        {"sliding_window": 5},
    ),
    "mistral_nemo": (
        {"head_dim": 12, "rope_theta": 1e6, "norm_eps": 1e-5},
        "MistralConfig",
        {"head_dim": 12, "sliding_window": None},
    ),
    "mistral_odd_heads": (
        {"hidden_size": 50, "head_dim": 6},
        "MistralConfig",
        {"head_dim": 6, "sliding_window": None},
    ),
    "qwen2_bias": (
        {"attention_bias": True, "tie_embeddings": True},
        "Qwen2Config",
        {"use_sliding_window": False},
    ),
    "qwen2_last_layers_have_windows": (
        {"attention_bias": True, "sliding_window": 5, "window_layers": (False, True)},
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2_yarn": (
        {"attention_bias": True, "rope_scaling": YARN},
        "Qwen2Config",
        {"rope_parameters": {"rope_theta": 1e4, **YARN_THERE}, "max_position_embeddings": 256},
    ),
    "qwen3": (
        {"head_dim": 16, "qk_norm": "head", "rope_theta": 1e6, "tie_embeddings": True},
        "Qwen3Config",
        {"head_dim": 16},
    ),
    "qwen3_yarn_with_its_own_factor": (
        {
            "qk_norm": "head",
            "rope_scaling": YARN.model_copy(update={"attention_factor": 1.3, "truncate": False}),
        },
        "Qwen3Config",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_theta": 1e4,
                "attention_factor": 1.3,
                "truncate": False,
                **YARN_THERE,
            },
        },
    ),
    "qwen3_windows_by_layer": (
        {
            "qk_norm": "head",
            "num_layers": 4,
            "sliding_window": 4,
            "window_layers": (True, True, False, True),
        },
        "Qwen3Config",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
        },
    ),
    "smollm3": (
        {"num_layers": 4, "rope_layers": (True, True, True, False), "rope_theta": 2e6},
        "SmolLM3Config",
        {"pad_token_id": None},
    ),
    "smollm3_windows_without_positions": (
        {
            "num_layers": 4,
            "rope_layers": (True, False),
            "sliding_window": 6,
            "window_layers": (False, True),
        },
        "SmolLM3Config",
        {
            "pad_token_id": None,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "olmo2": (
        {"qk_norm": "full", "norm_order": "post", "rope_theta": 5e5},
        "Olmo2Config",
        {"pad_token_id": None},
    ),
    "olmo2_wide_heads": (
        {"qk_norm": "full", "norm_order": "post", "head_dim": 10, "tie_embeddings": True},
        "Olmo2Config",
        {"pad_token_id": None, "head_dim": 10},
    ),
    "phi3": (
        {"partial_rotary_factor": 0.5, "head_dim": 12},
        "Phi3Config",
        {
            "pad_token_id": None,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}


def reference_model(config: DecoderConfig, kind: str, extra: dict) -> transformers.PreTrainedModel:
    """A transformers model of these sizes with no trivial weight."""
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": 64,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }
    settings = getattr(transformers, kind)(**{**values, **extra})
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


def _gpt2_pairs(
    decoder: Decoder, reference: transformers.PreTrainedModel
) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter, bool]]:
    """Our parameter, that of GPT2LMHeadModel, and whether it is stored transposed there."""
    theirs = dict(reference.named_parameters())
    yield decoder.embedding.weight, theirs.pop("transformer.wte.weight"), False
    yield decoder.positions.weight, theirs.pop("transformer.wpe.weight"), False
    modules = [(decoder.norm, "ln_f")]
    for i, block in enumerate(decoder.layers):
        modules += [
            (block.attention_norm, f"h.{i}.ln_1"),
            (block.attention.qkv, f"h.{i}.attn.c_attn"),
            (block.attention.o, f"h.{i}.attn.c_proj"),
            (block.mlp_norm, f"h.{i}.ln_2"),
            (block.mlp.gate_up, f"h.{i}.mlp.c_fc"),
            (block.mlp.down, f"h.{i}.mlp.c_proj"),
        ]
    for module, name in modules:
        for kind in ("weight", "bias"):
            theirs_here = theirs.pop(f"transformer.{name}.{kind}")
            yield getattr(module, kind), theirs_here, ".c_" in name and kind == "weight"
    assert not theirs


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_a_run_of_the_gpt2_preset_equals_transformers(activation: str) -> None:
    """From the keys of a configuration: logits, loss and every gradient."""
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_layers": 2, "num_heads": 6}
    model = {**sizes, "vocab_size": 101, "max_positions": 32, "activation": activation}
    config = run_of({"preset": "gpt2_124m", "pad_multiple": 1, **model})
    there = {"gelu_tanh": "gelu_new"}.get(activation, activation)
    settings = transformers.GPT2Config(
        vocab_size=101, n_embd=48, n_layer=2, n_head=6, n_positions=32, activation_function=there
    )
    torch.manual_seed(2)
    reference = transformers.GPT2LMHeadModel(settings).float().eval()
    for parameter in reference.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    decoder = build_model(config, torch.device("cpu")).float()
    with torch.no_grad():
        for ours, theirs, transposed in _gpt2_pairs(decoder, reference):
            ours.copy_(theirs.t() if transposed else theirs)
    ids = torch.randint(0, 101, (2, 32))
    logits = reference(ids).logits
    torch.testing.assert_close(decoder(ids), logits, atol=1e-5, rtol=1e-5)
    labels = ids.roll(-1, dims=1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = decoder(ids, labels) / labels.numel()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    loss.backward()
    for ours, theirs, transposed in _gpt2_pairs(decoder, reference):
        gradient = theirs.grad.t() if transposed else theirs.grad
        torch.testing.assert_close(ours.grad, gradient, atol=1e-5, rtol=1e-5)
    assert parameter_count(decoder) == reference.num_parameters()
