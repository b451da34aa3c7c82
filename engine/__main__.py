"""`python -m steep.engine RECIPE [key=value ...]`: training, alone or under torchrun."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Train by a recipe; a user's mistake is one line on stderr and status 2, a diverged run status 1."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m steep.engine RECIPE [key=value ...]", file=sys.stderr if not arguments else sys.stdout)
        sys.exit(0 if arguments else 2)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        print(f"steep: started with {world_size} processes; this version trains in one process only", file=sys.stderr)
        sys.exit(2)
    from .trainer import TrainingDiverged, train

    try:
        train(arguments[0], arguments[1:])
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"steep: {error}", file=sys.stderr)
        sys.exit(2)
    except (TrainingDiverged, OSError) as error:
        print(f"steep: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
