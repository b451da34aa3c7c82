"""Every Triton kernel compiles for Hopper at the shapes of 7B to 24B models: no spills, wide loads, wgmma."""

import pytest

from steep.bench.sm90 import compile_case, faults
from steep.bench.sm90_cases import cases


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.label)
def test_compiles_for_sm90(case):
    compiled = compile_case(case)
    assert compiled
    assert faults(case, compiled) == []
