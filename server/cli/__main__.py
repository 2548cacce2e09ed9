"""`python -m tuneloop.server.cli`: the same as `tuneloop`."""

from .main import main

main()
