"""`python -m steep.cli`: the `steep` command without its entry point script."""

from .app import main

main()
