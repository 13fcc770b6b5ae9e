"""`python -m tribill` is the command `tribill`."""

from tribill.cli import main

main()
