"""Models with a LoRA adapter in PEFT's format, read as if the adapter had been merged into the weights.

An `AdaptedModel` reads like a `SafetensorsFolder`: of an adapted tensor it gives weight + scale * (B @ A), in float32
and without ever writing the merged model; of a tensor that the adapter holds as a whole (`modules_to_save`, biases),
that one. Touches the folders of model and adapter, read only. The result does not depend on how a tensor is cut.

LoRA: https://arxiv.org/abs/2106.09685; scale is alpha / r, or alpha / sqrt(r) with rsLoRA, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.files import read_json
from ..engine.safetensors_io import SafetensorsFolder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.\w+)??(\.weight)?$")
# Kinds of adapters that are more than weight + scale * B @ A, by the key that says so.
_OTHER_KINDS = (
    *("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora"),
    *("alora_invocation_tokens", "arrow_config"),
)
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")  # ways of initialising that take a part out of the weights
_BLOCK = 1 << 15  # elements of a product held at once: they stay in the cache while the ranks are added up


@dataclass(frozen=True)
class _LowRank:
    """weight += scale * left @ right, with the factors named as the adapter's file names them."""

    a: str
    b: str
    transposed: bool  # the weight is [in, out], as embeddings and GPT-2's Conv1D have it
    scale: float


class AdaptedModel:
    """The tensors of a model folder under an adapter. Safe to use from several threads.

    Raises:
        FileNotFoundError: the adapter's configuration or weights are not there.
        ValueError: not a LoRA adapter, one of a kind that changes more than weights, tensors that fit nothing in the
            model or have other shapes or ranks, all named.
    """

    def __init__(self, base: SafetensorsFolder, adapter: Path) -> None:
        self.base, self.adapter = base, adapter
        self.path = base.path
        config = _read_config(adapter)
        if not (adapter / WEIGHTS).is_file():
            pickles = [entry.name for entry in adapter.iterdir() if entry.suffix in (".bin", ".pt", ".pth")]
            hint = f"; {sorted(pickles)[0]} is a pickle, and only safetensors are read" if pickles else ""
            raise FileNotFoundError(f"{adapter / WEIGHTS}: not found{hint}")
        self._stored = SafetensorsFolder(adapter, single_file=WEIGHTS)
        self._low_rank, self._replaced = _match(base, self._stored, config)
        self._factors = lru_cache(maxsize=16)(self._read_factors)

    @property
    def names(self) -> list[str]:
        return self.base.names

    @property
    def files(self) -> list[Path]:
        """Of the model, then of the adapter."""
        return [*self.base.files, self.adapter / CONFIG, *self._stored.files]

    def __contains__(self, name: str) -> bool:
        return name in self.base

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(self._replaced[name]) if name in self._replaced else self.base.shape(name)

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        """What `read_into` gives: float32 for an adapted tensor."""
        if name in self._replaced:
            return self._stored.dtype(self._replaced[name])
        return torch.float32 if name in self._low_rank else self.base.dtype(name)

    def file_of(self, name: str) -> Path:
        return self._stored.file_of(self._replaced[name]) if name in self._replaced else self.base.file_of(name)

    @property
    def adapted(self) -> list[str]:
        """Names of the tensors that differ from the model's own."""
        return [name for name in self.base.names if name in self._low_rank or name in self._replaced]

    def read_into(self, name: str, lo: int, out: Tensor) -> Tensor:
        """Fill `out`, a contiguous 1-D CPU tensor of `dtype(name)`, with the flat elements [lo, lo + len(out))."""
        if name in self._replaced:
            return self._stored.read_into(self._replaced[name], lo, out)
        if name not in self._low_rank:
            return self.base.read_into(name, lo, out)
        if out.dtype != torch.float32:
            raise ValueError(f"{name}: the buffer must be float32, as an adapted tensor is")
        out.copy_(self.base.read_into(name, lo, torch.empty(out.numel(), dtype=self.base.dtype(name))))
        self._add_product(name, lo, out)
        return out

    def _add_product(self, name: str, lo: int, out: Tensor) -> None:
        """out += scale * sum_k left[:, k] right[k, :], rank by rank: every step is one operation on each element, so
        that pieces, threads and devices leave no trace, which a matrix product does not promise."""
        left, right = self._factors(name)
        scale, columns = self._low_rank[name].scale, right.shape[1]
        rows_at_once = max(1, _BLOCK // columns)
        hi = lo + out.numel()
        for row in range(lo // columns, -(-hi // columns), rows_at_once):
            rows = left[row : row + rows_at_once]
            total = rows[:, :1] * right[0]
            product = torch.empty_like(total)
            for k in range(1, right.shape[0]):
                torch.mul(rows[:, k : k + 1], right[k], out=product)
                total += product
            total *= scale
            first = row * columns
            begin, end = max(lo, first), min(hi, first + total.numel())
            out[begin - lo : end - lo] += total.view(-1)[begin - first : end - first]

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """left [rows, r] and right [r, columns] in float32."""
        low_rank = self._low_rank[name]
        a, b = (self._stored.get(factor).to(torch.float32) for factor in (low_rank.a, low_rank.b))
        return (a.T.contiguous(), b.T.contiguous()) if low_rank.transposed else (b, a)

    def will_read(self, name: str, lo: int, count: int) -> None:
        if name in self._replaced:
            self._stored.will_read(self._replaced[name], lo, count)
        else:
            self.base.will_read(name, lo, count)

    def span(self, name: str) -> tuple[int, int]:
        """In `file_of(name)`."""
        return self._stored.span(self._replaced[name]) if name in self._replaced else self.base.span(name)

    def close(self) -> None:
        self.base.close()
        self._stored.close()


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG
    config = read_json(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; allowed: 'LORA'")
    for key in _OTHER_KINDS:
        if config.get(key):
            raise ValueError(f"{path}: {key} is {config[key]!r}; only plain LoRA can be merged")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}, which changes the base weights; save it as plain LoRA"
        )
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; allowed: a number above 0")
    return config


def _match(
    base: SafetensorsFolder, stored: SafetensorsFolder, config: Mapping[str, Any]
) -> tuple[dict[str, _LowRank], dict[str, str]]:
    """By the model's tensor: the factors that change it, and the tensor that takes its place."""
    problems: list[str] = []
    factors: dict[tuple[str, bool], dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in stored.names:
        plain = name.removeprefix(_PREFIX)
        if match := _FACTOR.match(plain):
            key = (match["module"], match["embedding"] is not None)
            factors.setdefault(key, {})[match["side"]] = name
            continue
        target = plain.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
        if target not in base:
            problems.append(f"{name}: the model has no tensor {target}")
        elif stored.shape(name)[1:] != base.shape(target)[1:]:
            problems.append(f"{name}: shape {list(stored.shape(name))}, in the model {list(base.shape(target))}")
        else:
            replaced[target] = name

    low_rank = {}
    for (module, is_embedding), sides in factors.items():
        target = f"{module}.weight"
        if sides.keys() != {"A", "B"}:
            problems.append(f"{next(iter(sides.values()))}: the other of lora_A and lora_B is missing")
            continue
        if target not in base:
            problems.append(f"{sides['A']}: the model has no tensor {target}")
            continue
        a, b = stored.shape(sides["A"]), stored.shape(sides["B"])
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        transposed = is_embedding or bool(config.get("fan_in_fan_out"))
        made = (a[-1], b[0]) if transposed else (b[0], a[-1])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or base.shape(target) != made:
            problems.append(f"{target}: {list(base.shape(target))} in the model, lora_A {list(a)}, lora_B {list(b)}")
        elif a[0] != rank:
            problems.append(f"{sides['A']}: rank {a[0]}, by {CONFIG} it should be {rank}")
        else:
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            low_rank[target] = _LowRank(sides["A"], sides["B"], transposed, scale)
    for target in low_rank.keys() & replaced.keys():
        problems.append(f"{target}: both adapted and replaced")
    if not low_rank and not replaced and not problems:
        problems.append("holds no tensor that changes the model")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{stored.files[0]}: does not fit {base.path}: {'; '.join(problems[:5])}{more}")
    return low_rank, replaced


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that the module's name ends with, as PEFT matches `rank_pattern`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
