"""The examples of the documentation run as they are printed, and learn something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.parametrize("name", ["plain_loop.py", "hf_trainer.py"])
def test_example(name):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--steps", "20"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"(?<!train_)loss'?:? +'?([\d.]+)", result.stdout)]
    assert losses[-1] < 0.9 * losses[0]
    if name == "hf_trainer.py":
        assert re.search(r"^ +20  steep$", result.stdout, re.MULTILINE)
