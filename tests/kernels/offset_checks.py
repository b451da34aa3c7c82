"""That no offset wraps around at 2^31: read off the intermediate code, without the memory that it would take to run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

from steep.bench.sm90 import capture, compile_launch
from tests.kernels.kernel_checks import kernel_module


def narrow_products(module_name: str, function: Callable, *args: Any) -> list[tuple[str, str]]:
    """The 32-bit multiplications by anything but a constant in the kernels that `function(*args)` launches, its tensors
    on the meta device: an index times a stride must not be among them."""
    triton = pytest.importorskip("triton")
    compiled = []

    def compile_and_keep(*args, compile=triton.compile, **kwargs):
        compiled.append(compile(*args, **kwargs))
        return compiled[-1]

    with patch.object(triton, "compile", compile_and_keep):
        for launch in capture(kernel_module(module_name), function, *args):
            compile_launch(launch)
    assert compiled
    found = []
    for kernel in compiled:
        constants = set(re.findall(r"(%\S+) = arith\.constant", kernel.asm["ttir"]))
        products = re.findall(r"arith\.muli (%\S+), (%\S+) : (?:i32|tensor<\S*xi32>)", kernel.asm["ttir"])
        found += [factors for factors in products if not constants & set(factors)]
    return found
