"""Moments in 8 bits."""

from __future__ import annotations

import io

import torch

from megalr.optim import GaLore
from megalr.optim.adam_h import BLOCK, decode, encode


def test_codes_return_values_within_the_stated_error_and_keep_zero_and_maximum():
    torch.manual_seed(0)
    for signed in (True, False):
        x = torch.randn(37, 53) * 10.0 ** torch.randint(-6, 3, (37, 53))
        x = x if signed else x.square()
        x[0, :7] = 0
        codes, scales = encode(x[None], signed)
        codes, scales = codes[0], scales[0]
        assert codes.dtype == (torch.int8 if signed else torch.uint8) and codes.shape == x.shape
        assert scales.numel() == -(-x.numel() // BLOCK)
        back = decode(codes[None], scales[None])[0]
        assert (back[0, :7] == 0).all() and (back.sign() * x.sign() >= 0).all()
        largest = scales.repeat_interleave(BLOCK)[: x.numel()].view_as(x)
        near = x.abs() > 0.1 * largest
        steps = 64 if signed else 128
        assert ((back - x).abs() <= 0.9 / steps * largest * 0.51)[near].all()
        assert (back.abs().view(-1)[:BLOCK].max() == scales[0]) and not back.isnan().any()
        assert (decode(torch.zeros_like(codes)[None], scales[None]) == 0).all()


def test_galore_with_8_bit_moments_follows_the_fp32_one_and_takes_a_quarter_of_its_bytes():
    torch.manual_seed(0)
    start = torch.randn(160, 40)
    runs = []
    for bits in (32, 8):
        p = torch.nn.Parameter(start.clone())
        optimizer = GaLore([p], lr=1e-2, rank=32, update_proj_gap=10, state_bits=bits)
        for t in range(30):
            generator = torch.Generator().manual_seed(t)
            p.grad = (p.detach() + 0.3 * torch.randn(p.shape, generator=generator)) * 0.1
            optimizer.step()
        runs.append((p.detach() - start, optimizer, p))
    moved, moved8 = runs[0][0], runs[1][0]
    assert (moved - moved8).norm() < 0.1 * moved.norm()
    own = next(iter(runs[1][1].state[runs[1][2]]["matrices"].values()))
    size = sum(t.numel() * t.element_size() for k, t in own.items() if k.startswith("exp_avg"))
    assert size == 2 * 160 * 32 + 2 * 4 * 160 * 32 // BLOCK
    file = io.BytesIO()
    torch.save(runs[1][1].state_dict(), file)
    file.seek(0)
    again = GaLore([runs[1][2]], lr=1e-2, rank=32, update_proj_gap=10, state_bits=8)
    again.load_state_dict(torch.load(file, weights_only=True))
    loaded = next(iter(again.state[runs[1][2]]["matrices"].values()))
    assert loaded["exp_avg"].dtype == torch.int8 and torch.equal(loaded["exp_avg"], own["exp_avg"])
    zeroed, _ = again.reset_moments()
    assert zeroed == 2 * 160 * 32
    values = decode(loaded["exp_avg_sq"][None], loaded["exp_avg_sq_scale"][None])
    assert values.abs().max() == 0
