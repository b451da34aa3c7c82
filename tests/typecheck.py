"""Type-check the packages under the name they are imported by.

The folders lie at the top level (`engine/`) but are imported as `steep.engine`; mypy sees that through a tree of links.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "data", "engine", "merge", "eval", "cli", "bench")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary, "steep")
        package.mkdir()
        for folder in FOLDERS:
            (package / folder).symlink_to(ROOT / folder)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--namespace-packages"]
        command += ["--explicit-package-bases", "--cache-dir", str(ROOT / ".mypy_cache"), "-p", "steep"]
        sys.exit(subprocess.run(command, cwd=temporary, env={**os.environ, "MYPYPATH": temporary}).returncode)
