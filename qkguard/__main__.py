"""`python -m qkguard`."""

from qkguard.cli import main

main()
