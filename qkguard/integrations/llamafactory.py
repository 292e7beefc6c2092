"""The guard in LLaMA-Factory: its training with the callback, and a section `qkguard` in its YAML.

    python -m qkguard.integrations.llamafactory FILE.yaml
    torchrun --nproc-per-node 8 -m qkguard.integrations.llamafactory FILE.yaml

In place of `llamafactory-cli train FILE.yaml`, which takes no callbacks. Overrides (`learning_rate=1e-5`) follow the
file.
"""

from __future__ import annotations

import sys

from qkguard.errors import QKGuardError
from qkguard.integrations.frameworks import needed
from qkguard.integrations.settings import checked
from qkguard.training.callback import QKGuardCallback


def main() -> None:
    """Train as LLaMA-Factory's file says, under the guard.

    Raises:
        ImportError: LLaMA-Factory is not installed.
        QKGuardError: a wrong setting in the section `qkguard`.
    """
    with needed("llamafactory", "LLaMA-Factory"):
        from llamafactory.hparams import read_args
        from llamafactory.train.tuner import run_exp

    args = read_args()  # a dict of the file; a list of options where no file comes first
    section = args.pop("qkguard", None) if isinstance(args, dict) else None
    run_exp(args, callbacks=[QKGuardCallback(**checked(section))])


if __name__ == "__main__":
    try:
        main()
    except QKGuardError as error:
        sys.exit(f"error: {error}")
