"""`python -m steep.engine RECIPE [key=value ...] [--plan]`: training, alone or under torchrun; or what it will take.

Status: 0 done, or stopped by SIGTERM or SIGUSR1 with a checkpoint; 1 the system failed (disk, network); 2 the user's
mistake; 3 the run diverged; 4 another process is dead or stuck; 130 stopped by SIGINT with a checkpoint.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Train by a recipe; what ends it is one line on stderr. arguments: those of the command line if None."""
    if arguments is None:
        arguments = sys.argv[1:]
    plan = "--plan" in arguments
    arguments = [argument for argument in arguments if argument != "--plan"]
    if not arguments or arguments[0] in ("-h", "--help"):
        usage = "usage: python -m steep.engine RECIPE [key=value ...] [--plan]"
        print(usage, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    from .ranks import is_agreed
    from .trainer import TrainingDiverged, train
    from .watchdog import PEER_LOST, PeerLost

    statuses = {
        TrainingDiverged: 3, PeerLost: PEER_LOST, ValueError: 2, FileNotFoundError: 2, FileExistsError: 2, OSError: 1,
    }  # fmt: skip
    try:
        if plan:
            from .plan_report import plan_command
            from .recipe import load_recipe

            plan_command(load_recipe(arguments[0], arguments[1:]))
            return
        train(arguments[0], arguments[1:])
    except tuple(statuses) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not is_agreed(error):  # what all ranks raise is said once
            notes = getattr(error, "__notes__", [])
            print(" ".join(["steep:", *([f"rank {rank}:"] if rank else []), str(error), *notes]), file=sys.stderr)
        sys.exit(next(status for kind, status in statuses.items() if isinstance(error, kind)))


if __name__ == "__main__":
    main()
