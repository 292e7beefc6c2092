"""`python -m qkguard.sft`, which `accelerate launch -m qkguard.sft` runs on every rank: the same as `qkguard sft`."""

import sys

from qkguard.cli import main

sys.argv[:1] = ["qkguard", "sft"]
main()
