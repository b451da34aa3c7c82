"""Rotary position embedding: the cos and sin tables of a `ModelConfig`. The rotation itself is `kernels.rope`.

Frequencies follow RoFormer (Su et al. 2021, arXiv:2104.09864), linear position interpolation (Chen et al. 2023,
arXiv:2306.15595), Llama 3.1's frequency smoothing, and YaRN (Peng et al. 2023, arXiv:2309.00071). Every operation is
done in fp32 in the order of transformers' `ROPE_INIT_FUNCTIONS`, so the tables are equal to the bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(inv_freq fp32 [head_dim / 2] in radians per position, factor on cos and sin) of the config's kind of scaling."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    pair_D2 = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wave_D2 = config.rope_theta**pair_D2
    inv_freq_D2 = 1.0 / wave_D2
    match scaling["rope_type"]:
        case "default":
            return inv_freq_D2, 1.0
        case "linear":
            return inv_freq_D2 / scaling["factor"], 1.0
        case "llama3":
            return _llama3(inv_freq_D2, scaling), 1.0
        case "yarn":
            return _yarn(wave_D2, config.rope_theta, scaling)
        case kind:
            raise AssertionError(f"config.py let rope_type {kind!r} through")


def _llama3(inv_freq_D2: Tensor, scaling: dict) -> Tensor:
    """Long waves are slowed down by `factor`, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq_D2
    smooth = (context / wavelength - low) / (high - low)
    interpolated = (1 - smooth) * inv_freq_D2 / factor + smooth * inv_freq_D2
    scaled = torch.where(wavelength > context / low, inv_freq_D2 / factor, interpolated)
    return torch.where(wavelength < context / high, inv_freq_D2, scaled)


def _yarn(wave_D2: Tensor, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """Pairs that turn more than `beta_fast` times in the original context are kept, those that turn less than
    `beta_slow` times are slowed down by `factor`, with a ramp between; cos and sin grow by `attention_factor`."""
    factor, pairs = scaling["factor"], len(wave_D2)

    def pair_turning(turns: float) -> float:
        wavelength = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return (2 * pairs * math.log(wavelength)) / (2 * math.log(theta))

    first, last = pair_turning(scaling.get("beta_fast", 32)), pair_turning(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    ramp_D2 = torch.clamp((torch.arange(pairs, dtype=torch.float32) - first) / (last - first), 0, 1)
    keep_D2 = 1 - ramp_D2
    inv_freq_D2 = 1.0 / (factor * wave_D2) * (1 - keep_D2) + 1.0 / wave_D2 * keep_D2

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None and "mscale" in scaling and "mscale_all_dim" in scaling:
        attention_factor = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    elif attention_factor is None:
        attention_factor = magnitude(1)
    return inv_freq_D2, attention_factor


class RopeTables:
    """cos and sin for the positions in use, on the device in use: fp32 [P, head_dim / 2] each, P growing by doubling.

    Not a module and no buffers on purpose: `module.to(bfloat16)` must not round the tables, `to_empty` must not leave
    rubbish in them, and a model made for a million positions need not hold a million rows.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.cos = self.sin = torch.empty(0, config.head_dim // 2, device="cpu")

    def get(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables that cover the positions 0 .. length - 1. ValueError beyond max_position_embeddings."""
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens: max_position_embeddings of this model is {limit}")
        if length > len(self.cos) or device != self.cos.device:
            rows = min(limit, max(len(self.cos), 1 << (length - 1).bit_length()))
            # on the CPU: the same bits for every device. Not as inference tensors: training may use the table next
            with torch.device("cpu"), torch.inference_mode(False):
                inv_freq_D2, attention_factor = inverse_frequencies(self.config)
                angle_PD2 = torch.arange(rows, dtype=torch.float32)[:, None] * inv_freq_D2
                self.cos = (angle_PD2.cos() * attention_factor).to(device)
                self.sin = (angle_PD2.sin() * attention_factor).to(device)
        return self.cos, self.sin
