"""factorize_, merge_ and split_parameters against dense layers, autograd and transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import megalr
from tests.library.models import Net, batch, llama, loss_of, net

TARGETS = ["up", "down"]


def _dense_twin(model: Net) -> Net:
    """A plain model with the weights that the factorized one stands for."""
    twin = net()
    for name, linear in twin.named_modules():
        if isinstance(linear, nn.Linear):
            layer = model.get_submodule(name)
            with torch.no_grad():
                linear.weight.copy_(layer.weight)
                if linear.bias is not None:
                    linear.bias.copy_(layer.bias)
    return twin


@pytest.mark.parametrize("density", [None, 0.2])
def test_outputs_and_gradients_are_those_of_the_dense_model(density: float | None) -> None:
    model = megalr.factorize_(net(), rank=3, targets=TARGETS, density=density, init="kaiming")
    if density is not None:  # B = 0 would prove little
        for layer in megalr.factorized_layers(model).values():
            nn.init.normal_(layer.b)
    twin = _dense_twin(model)
    assert torch.allclose(model(batch(0)), twin(batch(0)), rtol=1e-12)
    loss_of(model, batch(0)).backward()
    loss_of(twin, batch(0)).backward()
    for name, layer in megalr.factorized_layers(model).items():
        whole = twin.get_submodule(name).weight.grad
        assert torch.allclose(layer.b.grad, layer.scale * whole @ layer.a.T, atol=1e-12)
        assert torch.allclose(layer.a.grad, layer.scale * layer.b.T @ whole, atol=1e-12)
        assert torch.allclose(layer.bias.grad, twin.get_submodule(name).bias.grad, atol=1e-12)
        if density is not None:
            picked = whole.flatten()[layer.support.long()]
            assert torch.allclose(layer.values.grad, picked, atol=1e-12)
    assert torch.allclose(model.head.weight.grad, twin.head.weight.grad, atol=1e-12)


def test_svd_starts_at_the_best_approximation_of_the_weights() -> None:
    before = net()
    model = megalr.factorize_(net(), rank=4, targets=TARGETS)
    for name, layer in megalr.factorized_layers(model).items():
        u, s, vh = torch.linalg.svd(before.get_submodule(name).weight)
        best = u[:, :4] * s[:4] @ vh[:4]
        assert torch.allclose(layer.weight, best, atol=1e-7)
        assert torch.allclose(layer.b.T @ layer.b, layer.a @ layer.a.T, atol=1e-6)  # balanced
    full = megalr.factorize_(net(), rank=12, targets=TARGETS)
    assert torch.allclose(full(batch(0)), before(batch(0)), atol=1e-6)
    sparse = megalr.factorize_(net(), rank=4, targets=["up"], density=0.3)
    for name, layer in megalr.factorized_layers(sparse).items():
        rest = before.get_submodule(name).weight - layer.scale * layer.b @ layer.a
        assert torch.allclose(layer.values, rest.flatten()[layer.support.long()], atol=1e-6)


def test_draws_depend_on_seed_and_name_only() -> None:
    draw = partial(megalr.factorize_, rank=3, init="kaiming", density=0.1)
    one = draw(net(seed=1), targets=TARGETS).state_dict()
    two = draw(net(seed=2), targets=["down"]).state_dict()
    for key in ("a", "values", "support"):
        assert torch.equal(one[f"blocks.1.down.{key}"], two[f"blocks.1.down.{key}"])
    other = draw(net(), targets=["down"], seed=1).state_dict()
    assert not torch.equal(one["blocks.1.down.a"], other["blocks.1.down.a"])


def test_the_initial_draws_have_the_stated_variances() -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    layer = megalr.factorize_(copy.deepcopy(model), rank=100, init="kaiming", alpha=100.0)[0]
    assert float(layer.weight.detach().var()) == pytest.approx(1 / (9 * 400), rel=0.05)
    layer = megalr.factorize_(model, rank=100, init="full_rank_variance", init_std=0.05)[0]
    assert float(layer.weight.detach().std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("density", [None, 0.2])
def test_merge_gives_plain_linears_with_the_same_function(density: float | None) -> None:
    model = megalr.factorize_(net(torch.float32), rank=3, targets=TARGETS, density=density).eval()
    want = model(batch(0))
    merged = megalr.merge_(copy.deepcopy(model))
    assert not megalr.factorized_layers(merged)
    assert {type(m) for m in merged.modules()} == {type(m) for m in net().modules()}
    assert list(merged.state_dict()) == list(net().state_dict())
    assert torch.allclose(merged(batch(0)), want, atol=1e-5)
    assert not merged.blocks[0].up.training


def test_linears_of_transformers_models_are_replaced_and_put_back() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, ids = llama(), batch(0, vocabulary=40)
    before = model(ids).logits
    megalr.factorize_(model, rank=16)
    layers = megalr.factorized_layers(model)
    assert len(layers) == 14 and "lm_head" not in layers
    assert torch.allclose(model(ids).logits, before, atol=1e-4)  # full rank

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()
    before, kinds = gpt2(ids).logits, [type(m) for m in gpt2.modules()]
    megalr.factorize_(gpt2, rank=16, targets=["c_attn", "mlp.c_fc", "transformer.h.*.c_proj"])
    assert len(megalr.factorized_layers(gpt2)) == 8
    assert torch.allclose(gpt2(ids).logits, before, atol=1e-4)
    megalr.merge_(gpt2)
    assert [type(m) for m in gpt2.modules()] == kinds
    assert torch.allclose(gpt2(ids).logits, before, atol=1e-4)


def test_a_module_that_reads_the_weight_itself_still_computes_and_trains() -> None:
    """nn.MultiheadAttention reads out_proj.weight and does not call the linear."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2).double()
    model = megalr.factorize_(nn.ModuleList([copy.deepcopy(plain)]), rank=8)[0]
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    y = model(x, x, x)[0]
    assert torch.allclose(y, plain(x, x, x)[0], atol=1e-6)
    y.square().sum().backward()
    assert model.out_proj.a.grad is not None and model.out_proj.b.grad.abs().sum() > 0


@pytest.mark.parametrize("density", [None, 0.2])
def test_under_autocast_the_result_has_its_dtype_and_gradients_that_of_the_weights(density) -> None:
    model = megalr.factorize_(net(torch.float32), rank=3, targets=["up"], density=density)
    layer = model.blocks[0].up
    x = torch.randn(4, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.functional.linear(x, layer.weight).dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.a.grad.dtype == layer.b.grad.dtype == torch.float32
    assert torch.allclose(y.float(), layer(x), atol=0.05)


def test_a_shared_module_stays_shared_and_modes_and_frozen_weights_are_kept() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 6).requires_grad_(False))
    megalr.factorize_(model.eval(), rank=2)
    assert model[0] is model[2] and not model[0].training
    assert model[0].a.requires_grad and not model[3].a.requires_grad
    assert model[0].bias is shared.bias
    merged = megalr.merge_(model)
    assert merged[0] is merged[2] and not merged[3].weight.requires_grad


def test_split_parameters_has_factors_and_named_linears_apart_from_the_rest() -> None:
    model = megalr.factorize_(net(), rank=3, targets=["up"])
    matrices, others = megalr.split_parameters(model, targets=["up", "down"])
    names = {id(p): name for name, p in model.named_parameters()}
    got = [names[id(p)] for p in matrices]
    assert [n for n in got if n.startswith("blocks.0")] == [
        "blocks.0.up.a", "blocks.0.up.b", "blocks.0.down.weight",
    ]  # fmt: skip
    assert len(matrices) + len(others) == len(list(model.parameters()))
    copied = copy.deepcopy(model)  # torch copies no attributes of parameters
    marks = [getattr(p, "row_blocks", None) for p in megalr.split_parameters(copied, ["up"])[0]]
    assert marks[:2] == [(("blocks.0.up.A", 0, 3),), (("blocks.0.up.B", 0, 24),)]


def _tied() -> nn.Module:
    model = net()
    model.head.weight = model.embedding.weight
    return model


def _quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net(torch.float32), {nn.Linear})


class _Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _hooked() -> nn.Module:
    model = net()
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    return model


REFUSALS = {
    "rank beyond a side": (net, {"rank": 13}, r"rank = 13: blocks.0.up is 24 x 12.*at most 12"),
    "rank of the wrong kind": (net, {"rank": 0}, r"rank = 0: must be an integer from 1"),
    "no linears": (lambda: nn.ReLU(), {}, r"ReLU has no linear layers"),
    "no such target": (net, {"targets": ["q_proj"]}, r"no linear is named q_proj.*blocks\.\*\.up"),
    "one of two targets": (net, {"targets": ["up", "upp"]}, r"no linear is named upp"),
    "no such exclusion": (net, {"exclude": ["lm_head"]}, r"no linear is named lm_head"),
    "a word instead of a list": (net, {"targets": "up"}, r"must be a list of names"),
    "tied weights": (_tied, {}, r"head.weight is tied to embedding.weight"),
    "quantized": (_quantized, {}, r"no floating-point weight: quantized"),
    "a linear with its own forward": (
        lambda: nn.Sequential(_Scaled(4, 4)), {"rank": 2}, r"_Scaled: quantized and special",
    ),
    "no values": (lambda: Net().to("meta"), {}, r"meta device"),
    "a bare linear": (lambda: nn.Linear(4, 4), {"rank": 2}, r"put it into a module"),
    "hooks": (_hooked, {}, r"blocks.0.up has forward hooks"),
    "an unknown init": (net, {"init": "zero"}, r"init = 'zero'"),
    "a density that is none": (net, {"density": 1.0}, r"density = 1.0"),
    "an init without a sparse part": (
        net, {"density": 0.1, "init": "full_rank_variance"}, r"no sparse part",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line_and_changes_nothing(case: str) -> None:
    make, options, message = REFUSALS[case]
    model = make()
    before = list(model.modules())
    with pytest.raises(megalr.UserError, match=message) as caught:
        megalr.factorize_(model, **{"rank": 3, **options})
    assert "\n" not in str(caught.value)
    after = list(model.modules())
    assert len(before) == len(after) and all(x is y for x, y in zip(before, after, strict=True))


def test_merge_of_a_model_without_factors_is_an_error() -> None:
    with pytest.raises(megalr.UserError, match="no layers of factorize_"):
        megalr.merge_(net())


def test_the_library_imports_neither_deepspeed_nor_transformers() -> None:
    code = (
        "import sys, megalr; assert 'torch' not in sys.modules; megalr.factorize_; "
        "megalr.Restarts; megalr.optim.GaLore; "
        "print({'deepspeed', 'transformers', 'datasets', 'mpi4py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    assert all(hasattr(megalr, name) for name in megalr.__all__)
    assert set(megalr.__all__) <= set(dir(megalr))
    with pytest.raises(AttributeError, match="nothing"):
        megalr.nothing  # noqa: B018


@pytest.mark.parametrize("density", [None, 0.2])
def test_a_compiled_model_is_one_graph_with_the_same_outputs_and_gradients(density) -> None:
    model = megalr.factorize_(net(torch.float32), rank=3, targets=TARGETS, density=density)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled, batch(0)).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(model, batch(0)).backward()
    for grad, parameter in zip(found, model.parameters(), strict=True):
        assert torch.allclose(grad, parameter.grad, atol=1e-6)


def test_a_tied_head_is_no_target_unless_it_is_named() -> None:
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(megalr.UserError, match=r"lm_head\.weight is tied to"):
        megalr.factorize_(model, rank=4, targets=["lm_head"])
    assert len(megalr.factorized_layers(megalr.factorize_(model, rank=4))) == 14
