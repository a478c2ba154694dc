"""Configurations mean what transformers makes of them; every tensor is used or named."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalr.config.model import RopeScaling
from megalr.errors import UserError
from megalr.evaluation.offline import Request, evaluate_model
from megalr.hf.compare_logits import check_same_function
from megalr.hf.pretrained_config import pretrained_sizes
from megalr.hf.read import open_weights, read_weights
from megalr.hf.write import ExportOptions, write_model
from megalr.models.config import DecoderConfig, decoder_config
from tests.hf.models import FAMILIES, lively
from tests.models.settings import full_rank

NAMES = ("llama", "llama_tied", "mistral", "qwen2", "llama_3.2", "mistral_nemo", "qwen3")
NAMES = (*NAMES, "smollm3", "olmo2", "phi3")
ROUNDING = {"olmo2": 3e-6}
"""Bounds by family of what rounding makes of logits, 1e-6 for the others. OLMo-2's norms follow
small products: transformers' own logits differ by 1.4e-6 from those in float64."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder by family."""
    home = tmp_path_factory.mktemp("models")
    for family in NAMES:
        decoder = lively(full_rank(), **FAMILIES[family][0])
        write_model(decoder, home / family, ExportOptions("float32", "5GB", 64), None, "card")
    decoder = lively(full_rank(), **FAMILIES["gpt2"][0])
    write_model(decoder, home / "gpt2", ExportOptions("float32", "5GB", 64), None, "card")
    decoder = lively(full_rank())
    write_model(decoder, home / "sharded", ExportOptions("bfloat16", "40KB", 64), None, "card")
    return home


def _sizes(folder: Path) -> DecoderConfig:
    return decoder_config(None, pretrained_sizes(folder))


def _with_config(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in values.items() if v != "absent"}))
    return target


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_weights(folder, _sizes(folder))
    assert "\n" not in str(caught.value)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "family, changes, window",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, 16),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, None),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "layer_types": [SLIDING] * 2},
            7,
        ),
        ("qwen2", {"use_sliding_window": True, "layer_types": [FULL] * 2}, None),
        ("llama", {"sliding_window": 16}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {}, 5),
    ],
)
def test_the_window_is_that_of_the_layers_transformers_builds(
    family: str, changes: dict, window: int | None, models: Path, tmp_path: Path
) -> None:
    unset = {} if "layer_types" in changes else {"layer_types": "absent"}
    folder = _with_config(models / family, tmp_path / "model", **unset, **changes)
    sizes = _sizes(folder)
    assert sizes.sliding_window == window
    assert check_same_function(folder, sizes) < 1e-6


@pytest.mark.parametrize("family", NAMES)
def test_a_feature_that_was_misread_shows_in_the_logits(family: str, models: Path) -> None:
    folder = models / family
    sizes = _sizes(folder)
    assert check_same_function(folder, sizes) < ROUNDING.get(family, 1e-6)
    window = sizes.sliding_window
    wider = {
        "num_heads": sizes.num_heads // 2,
        "num_kv_heads": 1,
        "head_dim": 2 * sizes.head_width,
    }
    for wrong in (
        {"norm_eps": 10 * sizes.norm_eps},
        {"rope_theta": 1.1 * sizes.rope_theta},
        {"sliding_window": 5000 if window is None else None, "window_layers": None},
        {"sliding_window": 8 if window is None else window + 1},
        {"activation": "gelu_tanh"},
        {"norm_eps": 2.0} if sizes.qk_norm == "head" else wider,  # whose norms would be as wide
        {"rope_scaling": RopeScaling(type="linear", factor=1.05)},
        {"rope_layers": (False, True)},
        {"partial_rotary_factor": 0.5},
    ):
        with pytest.raises(UserError, match=r"differ from transformers' by .*cannot be imported"):
            check_same_function(folder, replace(sizes, **wrong))


def test_a_gpt2_that_was_misread_shows_in_the_logits(models: Path) -> None:
    sizes = _sizes(models / "gpt2")
    assert check_same_function(models / "gpt2", sizes) < 1e-6
    for wrong in (
        {"norm_eps": 1e-2},
        {"activation": "relu"},
        {"num_heads": 3, "num_kv_heads": 3, "head_dim": 16},
    ):
        with pytest.raises(UserError, match=r"differ from transformers' by .*cannot be imported"):
            check_same_function(models / "gpt2", replace(sizes, **wrong))


def test_gpt2_files_of_older_versions_are_read(models: Path, tmp_path: Path) -> None:
    """Names without a prefix, and the causal masks, as in the first published files."""
    folder = shutil.copytree(models / "gpt2", tmp_path / "old")
    stored = load_file(folder / SINGLE)
    old = {name.removeprefix("transformer."): value for name, value in stored.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    save_file(old | masks, folder / SINGLE, {"format": "pt"})
    expected = read_weights(models / "gpt2")
    found = open_weights(folder, _sizes(folder))
    assert sorted(found.names()) == sorted(expected.names())
    assert all(torch.equal(found[name], expected[name]) for name in expected.names())
    query = stored["transformer.h.1.attn.c_attn.weight"][:, :48].t()
    assert torch.equal(found["model.layers.1.self_attn.q_proj.weight"], query)


def test_weights_in_half_precision_are_compared_as_exactly(models: Path) -> None:
    assert check_same_function(models / "sharded", _sizes(models / "sharded")) < 1e-6


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types chunked_attention"),
        ("qwen2", {"layer_types": [FULL]}, "layer.types"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type dynamic",
        ),
        (
            "llama",
            {"rope_parameters": "absent", "rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope_type longrope|transformers cannot read it .*short_factor",
        ),
        ("llama", {"rope_parameters": {"rope_type": "new", "factor": 2.0}}, "rope_type new"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            r"rope_type linear \(factor 0.5: input should be greater than or equal to 1",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "1"}},
            "attention_factor '1': input should be a valid number",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                }
            },
            "low_freq_factor 4 must be below high_freq_factor 1",
        ),
        ("phi3", {"partial_rotary_factor": 0.7, "rope_parameters": "absent"}, "11 rotated dimen"),
        ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": "absent"}, "factor 1.5"),
        ("qwen3", {"attention_bias": True}, "a qwen3 model with attention_bias"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "3 no_rope_layers for 4 layers"),
        ("smollm3", {"no_rope_layers": ["yes"]}, "no_rope_layers.0 is yes: input should be"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"mlp_bias": True}, "with mlp_bias"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0: input should be greater"),
        ("llama", {"hidden_size": -64}, "hidden_size is -64"),
        ("llama", {"hidden_size": 64.0}, "hidden_size is 64.0: input should be a valid integer"),
        ("llama", {"hidden_size": True}, "hidden_size is True: input should be a valid integer"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("llama", {"num_hidden_layers": 9000}, "config.json says 9000 layers, the weights are 21"),
        ("llama", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ("llama", {"vocab_size": 10**7}, r"embed_tokens.weight has shape \(101, 48\), config.json"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is no"),
        ("llama", {"num_key_value_heads": 4}, "6 heads on 4 key/value heads"),
        ("llama", {"num_attention_heads": 16, "head_dim": 3}, "an odd head_dim, 3"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        ("gpt2", {"activation_function": "tanh"}, "a gpt2 model with activation_function tanh"),
        ("gpt2", {"scale_attn_weights": False}, "with scale_attn_weights False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "with scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"n_head": 7}, "hidden_size 48 not a multiple of 7 heads"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000"),
        ("gpt2", {"n_positions": 16}, r"embed_positions.weight has shape \(32, 48\), config.json"),
        ("gpt2", {"n_inner": 96}, r"up_proj.bias has shape \(192,\), config.json"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(
    family: str, changes: dict, message: str, models: Path, tmp_path: Path
) -> None:
    _refused(_with_config(models / family, tmp_path / "model", **changes), message)


@pytest.mark.parametrize(
    "architecture, changes, message",
    [
        (
            "gemma2",
            {"final_logit_softcapping": 30.0},
            r"soft caps \(final_logit_softcapping 30.0\)",
        ),
        ("mixtral", {"num_local_experts": 8}, r"a mixture of experts \(num_local_experts 8\)"),
        ("qwen3_moe", {"num_experts": 128}, r"a mixture of experts \(num_experts 128\)"),
        (
            "deepseek_v3",
            {"n_routed_experts": 256, "kv_lora_rank": 512},
            r"experts \(n_routed_experts 256\), latent attention \(kv_lora_rank 512\)",
        ),
    ],
)
def test_other_architectures_are_refused_with_the_features_that_are_missing_here(
    architecture: str, changes: dict, message: str, models: Path, tmp_path: Path
) -> None:
    folder = _with_config(models / "llama", tmp_path / "m", model_type=architecture, **changes)
    _refused(folder, f"architecture '{architecture}' with .*{message} cannot be read")


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (  # config.json of transformers 4
            "llama",
            {"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": RopeScaling(type="linear", factor=2.0)},
        ),
        (
            "llama_3.2",
            {"rope_parameters": "absent"},  # rope_theta and rope_scaling stay
            {"rope_scaling": FAMILIES["llama_3.2"][0]["rope_scaling"], "rope_theta": 5e5},
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.5,
                    "truncate": False,
                }
            },
            {
                "rope_scaling": RopeScaling(
                    type="yarn",
                    factor=4.0,
                    original_max_positions=32,
                    attention_factor=(0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
                    truncate=False,
                )
            },
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 1,
                "layer_types": "absent",
            },
            {"sliding_window": 16, "window_layers": (False, True), "qk_norm": "head"},
        ),
        (
            "smollm3",
            {"no_rope_layers": "absent", "no_rope_layer_interval": 4, "layer_types": "absent"},
            {
                "rope_layers": (True, True, True, False),
                "window_layers": (False, False, False, True),
            },
        ),
        (
            "smollm3",
            {"no_rope_layers": [1, 0, 0, 1, 0]},
            {"rope_layers": (True, False, False, True)},
        ),
        ("mistral_nemo", {}, {"head_dim": 12, "hidden_size": 50}),
        ("olmo2", {}, {"norm_order": "post", "qk_norm": "full", "head_dim": 12}),
        ("phi3", {}, {"partial_rotary_factor": 0.75, "sliding_window": 7}),
    ],
)
def test_features_are_read_as_transformers_reads_them(
    family: str, changes: dict, expected: dict, models: Path, tmp_path: Path
) -> None:
    folder = _with_config(models / family, tmp_path / "model", **changes)
    sizes = _sizes(folder)
    assert {key: getattr(sizes, key) for key in expected} == expected
    assert check_same_function(folder, sizes) < ROUNDING.get(family, 1e-6)


def test_a_file_that_is_no_strict_json_object_is_refused(models: Path, tmp_path: Path) -> None:
    folder = _with_config(models / "llama", tmp_path / "model")
    good = (folder / "config.json").read_text()
    for text, message in [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds no JSON object"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"rms_norm_eps": NaN}', "NaN is not a number of JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"x": ' + '{"x": ' * 50_000, "nested too deeply"),
        ("\udcff", "not valid JSON"),
        (good[:-40], "not valid JSON"),
    ]:
        (folder / "config.json").write_text(text, errors="surrogateescape")
        _refused(folder, message)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    _refused(folder, "not a regular file")


def test_code_of_a_folder_is_never_offered_to_be_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run the folder's code")

    monkeypatch.setattr("builtins.input", asked)
    own = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", None],
    }
    folder = _with_config(models / "llama", tmp_path / "llama", auto_map=own)
    (folder / "code.py").write_text("raise SystemExit('ran')")
    assert check_same_function(folder, _sizes(folder)) < 1e-6  # transformers' own class
    other = _with_config(models / "llama", tmp_path / "own", auto_map=own, model_type="mine")
    _refused(other, "'mine' cannot be read .it needs the folder's own code, which is not run.")


def test_evaluation_runs_no_code_and_checks_sizes_first(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run the folder's code")

    monkeypatch.setattr("builtins.input", asked)
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    request = Request(data=("nowhere",))
    for name, changes, message in (
        ("own", {"model_type": "mine", "auto_map": own}, "needs the folder's own code, which is"),
        ("huge", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("none", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ):
        folder = _with_config(models / "llama", tmp_path / name, **changes)
        (folder / "code.py").write_text("raise SystemExit('ran')")
        with pytest.raises(UserError, match=message) as caught:
            evaluate_model(folder, request, torch.device("cpu"))
        assert "\n" not in str(caught.value)


def _rewrite(folder: Path, change: Any) -> Path:
    path = folder / SINGLE
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return folder


def test_a_tied_head_may_be_stored_and_must_be_the_embedding(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama_tied", folder)
    _rewrite(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    open_weights(folder, _sizes(folder))
    assert check_same_function(folder, _sizes(folder)) < 1e-6
    _rewrite(folder, lambda t: t[HEAD].mul_(1.5))
    _refused(folder, "lm_head.weight differs from model.embed_tokens.weight .*set it to false")
    _with_config(folder, tmp_path / "untied", tie_word_embeddings=False)
    sizes = _sizes(tmp_path / "untied")
    open_weights(tmp_path / "untied", sizes)
    assert check_same_function(tmp_path / "untied", sizes) < 1e-6


def test_stored_frequencies_must_be_those_of_theta(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama", folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    right = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _rewrite(folder, lambda t, dtype=dtype: t.update({name: right.to(dtype)}))
        open_weights(folder, _sizes(folder))
    _rewrite(folder, lambda t: t.update({name: right / 2}))
    _refused(folder, f"{name} holds other frequencies than rope_theta 500000 gives")


def test_an_adapter_beside_the_weights_is_refused(models: Path, tmp_path: Path) -> None:
    folder = _with_config(models / "llama", tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    _refused(folder, "an adapter")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_that_no_weight_has_is_refused(
    dtype: torch.dtype, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama", folder)
    _rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    _refused(folder, "model.norm.weight has dtype .*weights have F64, F32, BF16, F16")


def test_an_index_names_files_of_the_folder_and_matches_them(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "sharded", folder)
    sizes = _sizes(folder)
    open_weights(folder, sizes)
    index = json.loads((folder / INDEX).read_text())
    table: dict[str, str] = index["weight_map"]
    shutil.copyfile(folder / table[EMBEDDING], tmp_path / table[EMBEDDING])
    other = next(file for file in table.values() if file != table[EMBEDDING])
    for changes, message in [
        ({EMBEDDING: f"../{table[EMBEDDING]}"}, "into '../model.*which is no .*file of the folder"),
        ({EMBEDDING: str(tmp_path / table[EMBEDDING])}, "which is no .*file of the folder"),
        ({EMBEDDING: 3}, "into 3, which is no"),
        ({EMBEDDING: "pytorch_model.bin"}, "which is no"),
        ({EMBEDDING: other}, f"holds {EMBEDDING}, which .* has in {other}"),
        ({"model.extra": other}, "lacks model.extra, which"),
    ]:
        (folder / INDEX).write_text(json.dumps({"weight_map": {**table, **changes}}))
        _refused(folder, message)
    less = {name: file for name, file in table.items() if name != EMBEDDING}
    (folder / INDEX).write_text(json.dumps({"weight_map": less}))
    _refused(folder, f"holds {EMBEDDING}, which .* has nowhere")
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    with safe_open(folder / other, framework="pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, folder / SINGLE)  # noqa: SIM118
    _refused(folder, "holds both model.safetensors and model.safetensors.index.json")
