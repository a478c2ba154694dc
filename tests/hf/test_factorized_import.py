"""A factorized folder becomes the start of a run: the same function, from its products B A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import megalr.hf.auto  # noqa: F401  (registers the classes of factorized folders)
from megalr.errors import UserError
from megalr.hf.compare_logits import check_same_function
from megalr.hf.init_from_pretrained import Imported, import_weights
from megalr.hf.pretrained_config import pretrained_sizes
from megalr.hf.read import open_weights, read_weights
from megalr.hf.write import ExportOptions, write_model
from megalr.models.build import build_decoder
from megalr.models.config import decoder_config
from megalr.models.decoder import Decoder
from tests.hf.models import FAMILIES, lively
from tests.hf.test_factorized import load, sample
from tests.models.settings import full_rank, low_rank, mixed

NOT_IMPORTED = ("llama_biases", "gpt2", "gpt2_untied")


def write(path: Path, size: str = "5GB", **sizes: Any) -> Path:
    """A factorized folder of rank 8."""
    options = ExportOptions("float32", size, 64, form="factorized")
    write_model(lively(low_rank(), **sizes), path, options, None, "card")
    return path


def imported(folder: Path, method: Any) -> tuple[Decoder, Imported]:
    """A decoder of the folder's sizes that has its weights."""
    sizes = decoder_config(None, pretrained_sizes(folder))
    open_weights(folder, sizes)
    assert check_same_function(folder, sizes) < 5e-5
    decoder = build_decoder(sizes, method, seed=1)
    return decoder.eval(), import_weights(folder, decoder, torch.device("cpu"))


def test_factors_of_gpt2_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", **FAMILIES["gpt2"][0])
    with pytest.raises(UserError, match=r"export of GPT-2 cannot be read.*--form dense"):
        pretrained_sizes(folder)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_IMPORTED])
@torch.no_grad()
def test_a_run_starts_with_the_folders_function(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", **FAMILIES[family][0])
    expected = load(folder)(sample()).logits
    for method in (low_rank(), full_rank()):
        decoder, result = imported(folder, method)
        torch.testing.assert_close(decoder(sample()), expected, atol=2e-5, rtol=2e-5)
        assert max(result.relative_error.values()) < 1e-6
    _, result = imported(folder, low_rank(4))
    assert min(result.relative_error.values()) > 0.01  # a smaller rank truncates


@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_a_folder_of_mixed_ranks_is_read_and_started_from(family: str, tmp_path: Path) -> None:
    source, folder = lively(mixed(low_rank()), **FAMILIES[family][0]), tmp_path / "model"
    write_model(source, folder, ExportOptions("float32", "5GB", 64, form="factorized"), None, "")
    for method in (mixed(low_rank()), full_rank()):
        decoder, result = imported(folder, method)
        torch.testing.assert_close(decoder(sample()), source(sample()), atol=2e-5, rtol=2e-5)
        assert max(result.relative_error.values()) < 1e-6


@torch.no_grad()
def test_matrices_are_the_products_of_the_stored_factors(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "20KB", attention_bias=True)
    weights = read_weights(folder)
    stored: dict[str, torch.Tensor] = {}
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        stored |= load_file(file)
    a = stored["model.layers.1.self_attn.shared_a.weight"]
    for index, leaf in enumerate(("q_proj", "k_proj", "v_proj")):
        name = f"model.layers.1.self_attn.{leaf}"
        product = stored[f"{name}.b.weight"] @ a[8 * index : 8 * index + 8]
        torch.testing.assert_close(weights[f"{name}.weight"], product)
        assert weights.shape(f"{name}.weight") == product.shape
        assert torch.equal(weights[f"{name}.bias"], stored[f"{name}.b.bias"])
    name = "model.layers.0.mlp.down_proj"
    product = stored[f"{name}.b.weight"] @ stored[f"{name}.a.weight"]
    torch.testing.assert_close(weights[f"{name}.weight"], product)
    assert not any("shared_a" in name or ".b." in name for name in weights.names())


OUT = "model.layers.1.self_attn.o_proj"
DAMAGE: dict[str, tuple[Any, str]] = {
    "no A": (
        lambda t: t.pop(f"{OUT}.a.weight"),
        f"lacks {OUT}.a.weight",
    ),
    "no shared A": (
        lambda t: t.pop("model.layers.0.mlp.shared_a.weight"),
        "lacks model.layers.0.mlp.shared_a.weight",
    ),
    "no B": (lambda t: t.pop(f"{OUT}.b.weight"), f"lacks {OUT}.weight"),
    "a short A": (
        lambda t: t.update({f"{OUT}.a.weight": torch.ones(7, 48)}),
        r"o_proj.a.weight has 7 rows and .*o_proj.b.weight ends at 8",
    ),
    "a narrow A": (
        lambda t: t.update({f"{OUT}.a.weight": torch.ones(8, 47)}),
        r"o_proj.weight has shape \(48, 47\), config.json says \(48, 48\)",
    ),
    "one dimension": (
        lambda t: t.update({f"{OUT}.b.weight": torch.ones(48)}),
        r"o_proj.b.weight is no matrix",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_factors_that_do_not_fit_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    folder = write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        open_weights(folder, decoder_config(None, pretrained_sizes(folder)))
    assert "\n" not in str(caught.value)
