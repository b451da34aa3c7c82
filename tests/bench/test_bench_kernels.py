"""`steep bench kernels`: the cases are right at any size, figures belong together, the README follows the record."""

import json

import pytest
import torch

from steep.bench import kernel_cases, kernel_report, kernels
from steep.bench.kernel_timing import bind, relative_error

AT = kernel_cases.place("cpu")
CASES = list(kernel_cases.cases(AT))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_everyone_computes_the_same(case):
    problem = case.build(min(case.few_tokens, 64))
    if problem.formula is None:
        return
    for who in set(kernels.cpu_who(case)) - {"compile"}:
        assert relative_error(problem.functions[who], problem.formula, problem.inputs) < 5e-6


def test_modes():
    x = torch.tensor([3.0], requires_grad=True)
    calls = []

    def square(x):
        calls.append(torch.is_grad_enabled())
        return x * x

    assert not bind(square, (x,), "forward")().requires_grad
    backward = bind(square, (x,), "backward")
    count = len(calls)
    assert backward()[0] == backward()[0] != 0
    assert len(calls) == count  # the forward pass is not repeated
    full = bind(square, (x,), "full")
    count = len(calls)
    full()
    assert len(calls) == count + 1


def test_relative_error_sees_results_and_gradients():
    inputs = (torch.randn(8, requires_grad=True),)
    assert relative_error(lambda x: x * x, lambda x: x.square(), inputs) < 1e-7
    assert relative_error(lambda x: x * x * 1.01, lambda x: x * x, inputs) == pytest.approx(0.01, rel=1e-3)
    wrong_gradient = relative_error(lambda x: x * x.detach(), lambda x: x * x, inputs)
    assert wrong_gradient == pytest.approx(0.5, rel=1e-3)


def record(gpu: bool) -> dict:
    row = {"kernel": "k", "shape": "4 x 4", "mode": "forward"}
    results = [
        row | {"who": "steep", "ms": 2.0, "of_floor": 0.5, "target": 0.9},
        row | {"who": "eager", "ms": 5.0, "of_floor": 0.2},
        row | {"who": "liger", "not_measured": "time was up"},
    ]
    device = {"cpu": "EPYC", "cores": 2} | ({"gpus": ["NVIDIA H100"]} if gpu else {})
    figures = {"dtype": "bfloat16", "copy_gb_s": 2900.0, "matmul_tflops": 700.0, "results": results}
    return {"created": "2026-11-25T10:00:00+00:00", "device": device, "figures": figures}


def test_table_has_factors_and_names_what_it_ran_on():
    assert "| k | 4 x 4 | forward | 2 | 50 % (target 90) | 2.50 x |" in kernel_report.table(record(gpu=True))
    cpu = kernel_report.table(record(gpu=False))
    assert "| 50 % | 2.50 x |" in cpu  # targets are about a GPU
    assert "2 cores of an EPYC" in cpu


def test_readme_keeps_all_but_the_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{kernel_report.BEGIN}\nold\n{kernel_report.END}\nafter\n")
    kernel_report.update_readme(record(gpu=False), readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{kernel_report.END}\nafter\n")
    assert "old" not in text
    kernel_report.update_readme(record(gpu=False), readme)
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="kernels: begin"):
        kernel_report.update_readme(record(gpu=False), readme)


def test_plot_is_a_picture(tmp_path):
    kernel_report.plot(record(gpu=True), tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_rates_are_of_the_floor():
    work = kernel_cases.Work(bytes=2e9, target=0.9)
    figures = kernels._rates(1.0, work, (3e12, 1e15))
    assert figures["gb_s"] == pytest.approx(2000)
    assert figures["of_floor"] == pytest.approx(2 / 3)
    json.dumps(figures)
