"""What GPUs can do, from their makers' data sheets: the one table that metrics, plans and benchmarks read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU. FLOP/s are dense (no sparsity), bandwidths bytes/s.

    memory: what torch reports as total, a little less than what the name says. float8_flops: None where there is none.
    link: to the other GPUs of its machine, each way. host: to host memory, each way. network: its share of the
    machine's network in the vendor's own design (one 400 or 200 Gb/s port per GPU).
    """

    name: str
    memory: float
    bandwidth: float
    bf16_flops: float
    float8_flops: float | None
    link: float
    host: float
    network: float


# By a part of the device's name as the driver gives it, the more special name first. Sources: NVIDIA's data sheets of
# H100, H200, A100, L40S, GH200 and DGX B200. NVLink is stated there both ways together: half of it here.
GPUS = {
    "H100 PCIe": Gpu("h100-pcie", 85.0 * GB, 2.00e12, 756e12, 1513e12, 300 * GB, 63 * GB, 50 * GB),
    "H100 NVL": Gpu("h100-nvl", 100.0 * GB, 3.90e12, 835e12, 1671e12, 300 * GB, 63 * GB, 50 * GB),
    "GH200": Gpu("gh200", 101.0 * GB, 4.00e12, 989e12, 1979e12, 450 * GB, 450 * GB, 50 * GB),
    "H100": Gpu("h100", 85.0 * GB, 3.35e12, 989e12, 1979e12, 450 * GB, 63 * GB, 50 * GB),
    "H200": Gpu("h200", 150.1 * GB, 4.80e12, 989e12, 1979e12, 450 * GB, 63 * GB, 50 * GB),
    "H800": Gpu("h800", 85.0 * GB, 3.35e12, 989e12, 1979e12, 200 * GB, 63 * GB, 50 * GB),
    "B200": Gpu("b200", 191.0 * GB, 8.00e12, 2250e12, 4500e12, 900 * GB, 63 * GB, 50 * GB),
    "A100-SXM4-40GB": Gpu("a100-40gb", 42.3 * GB, 1.55e12, 312e12, None, 300 * GB, 31 * GB, 25 * GB),
    "A100-PCIE-40GB": Gpu("a100-pcie-40gb", 42.3 * GB, 1.55e12, 312e12, None, 31 * GB, 31 * GB, 25 * GB),
    "A100": Gpu("a100", 85.0 * GB, 2.04e12, 312e12, None, 300 * GB, 31 * GB, 25 * GB),
    "A800": Gpu("a800", 85.0 * GB, 2.04e12, 312e12, None, 200 * GB, 31 * GB, 25 * GB),
    "L40S": Gpu("l40s", 47.7 * GB, 0.864e12, 362e12, 733e12, 31 * GB, 31 * GB, 25 * GB),
}


def find_gpu(name: str) -> Gpu:
    """The GPU that a user names. ValueError: not in the table."""
    by_name = {gpu.name: gpu for gpu in GPUS.values()}
    if name.lower() not in by_name:
        raise ValueError(f"gpu: {name!r} is not known; allowed: {', '.join(sorted(by_name))}")
    return by_name[name.lower()]


def gpu_of(device: torch.device) -> Gpu | None:
    """A CUDA device's entry, with the memory that it really has (a slice of a card has less); None if not listed."""
    properties = torch.cuda.get_device_properties(device)
    found = next((gpu for part, gpu in GPUS.items() if part in properties.name), None)
    return found and dataclasses.replace(found, memory=float(properties.total_memory))
