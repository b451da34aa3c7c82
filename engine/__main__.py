"""`python -m steep.engine RECIPE [key=value ...]`: training, alone or under torchrun.

Status: 0 done, or stopped by SIGTERM or SIGUSR1 with a checkpoint; 1 the system failed (disk, network); 2 the user's
mistake; 3 the run diverged; 4 another process is dead or stuck; 130 stopped by SIGINT with a checkpoint.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Train by a recipe; what ends it is one line on stderr."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m steep.engine RECIPE [key=value ...]", file=sys.stderr if not arguments else sys.stdout)
        sys.exit(0 if arguments else 2)
    from .trainer import TrainingDiverged, train

    try:
        train(arguments[0], arguments[1:])
    except (ValueError, OSError, TrainingDiverged) as error:
        rank = int(os.environ.get("RANK", "0"))
        if not (rank and getattr(error, "of_rank_zero", False)):
            print(f"steep: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        mistake = isinstance(error, ValueError | FileNotFoundError | FileExistsError)
        sys.exit(2 if mistake else 3 if isinstance(error, TrainingDiverged) else 1)


if __name__ == "__main__":
    main()
