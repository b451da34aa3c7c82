"""The bit patterns of a bf16 weight with a remainder, written out once more for the tests."""

import torch
from torch import Tensor


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master: weight * 2^16 + remainder on the bit patterns."""
    return (weight.detach().view(torch.int16).to(torch.int32) * (1 << 16) + remainder).view(torch.float32)


def split_master(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write a finite fp32 master into its bf16 weight, rounded to nearest, and the int16 remainder."""
    bits = master.view(torch.int32)
    high = (bits + (1 << 15)) >> 16
    weight.view(torch.int16).copy_(high)
    remainder.copy_(bits - (high << 16))
