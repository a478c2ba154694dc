"""Rotary positions (RoPE, arXiv 2104.09864 §3.2): frequencies, their scaling, tables.

Shapes: S sequence, W rotary width, at most the head width, even.
"""

from __future__ import annotations

import math

import torch

from megalr.config.model import RopeScaling


def rope_frequencies(
    width: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> torch.Tensor:
    """``(W/2,)`` float32: radians per token of each pair of dimensions, ``theta^(-2i/W)`` scaled.

    With g = theta^(-2i/W), factor s and 2 pi / g the wavelength, the scaled frequency is
    ``(1 - m) g / s + m g``. m is the part that is not stretched:

    * linear: 0 (arXiv 2306.15595 §3.1);
    * llama3: ``(L g / (2 pi) - low) / (high - low)``, clamped to 0 and 1, where L is the original
      length and low, high are low_freq_factor, high_freq_factor;
    * yarn: 1 below dimension ``d(beta_fast)``, 0 above ``d(beta_slow)`` and linear between, where
      dimension d(b) = ``W ln(L / (2 pi b)) / (2 ln theta)`` turns b times within L (arXiv
      2309.00071 §3.2).
    """
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    plain = theta**-exponent
    if scaling is None:
        return plain
    kept: torch.Tensor | float = 0.0
    if scaling.type == "llama3":
        kept = _kept_by_wavelength(plain, scaling)
    elif scaling.type == "yarn":
        kept = _kept_by_turns(width, theta, scaling, device)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _kept_by_wavelength(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    length, low, high = (
        scaling.original_max_positions,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    assert length is not None and low is not None and high is not None  # checked by the section
    turns = length * plain / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_turns(
    width: int, theta: float, scaling: RopeScaling, device: torch.device
) -> torch.Tensor:
    length = scaling.original_max_positions
    assert length is not None  # checked by the section

    def dimension(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    pairs = torch.arange(width // 2, device=device, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)


def rope_amplitude(scaling: RopeScaling | None) -> float:
    """What multiplies cosines and sines: yarn's attention factor, 0.1 ln(factor) + 1 by default.

    Scores are multiplied by its square (arXiv 2309.00071 §3.4).
    """
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def rope_tables(
    length: int,
    width: int,
    theta: float,
    device: torch.device,
    scaling: RopeScaling | None = None,
) -> torch.Tensor:
    """``(2, S, W)`` float32: cosines and sines of position times frequency, half-split.

    Element i is paired with element i + W/2.
    """
    frequencies = rope_frequencies(width, theta, scaling, device)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)  # (S, W)
    return torch.stack((angles.cos(), angles.sin())) * rope_amplitude(scaling)
