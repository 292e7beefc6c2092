"""What is known of the frameworks without importing them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qkguard.errors import QKGuardError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Framework:
    """How the guard gets into a framework: what to add where, and the file to name where the framework loads one."""

    name: str
    add: str
    file: Path | None = None

    def to_json(self) -> dict[str, str | None]:
        """Plain values."""
        return {"name": self.name, "add": self.add, "file": str(self.file) if self.file else None}


FRAMEWORKS = (
    Framework("axolotl", "in the YAML: plugins: [qkguard.integrations.axolotl.QKGuardPlugin]"),
    Framework(
        "ms-swift",
        "on the command line: --external_plugins $(qkguard integrations ms-swift) --callbacks qkguard",
        HERE / "ms_swift" / "qkguard_ms_swift.py",
    ),
    Framework(
        "llama-factory",
        "instead of llamafactory-cli train: python -m qkguard.integrations.llamafactory FILE.yaml",
        HERE / "llamafactory.py",
    ),
    Framework("trl, Unsloth", "in the script: SFTTrainer(..., callbacks=[QKGuardCallback()])"),
    Framework("transformers", "in the script: Trainer(..., callbacks=[QKGuardCallback()])"),
    Framework("verl, Megatron-Bridge, miles", "in the hook after a save: restore_after_save(base, folder)"),
)


def find_framework(name: str) -> Framework:
    """The framework of that name.

    Raises:
        QKGuardError: there is none.
    """
    found = {name: framework for framework in FRAMEWORKS for name in framework.name.lower().split(", ")}
    wanted = name.lower().replace("_", "-").replace("llamafactory", "llama-factory")
    if wanted not in found:
        raise QKGuardError(f"Unknown framework {name!r}; expected {', '.join(found)}.")
    return found[wanted]


@contextmanager
def needed(module: str, package: str) -> Iterator[None]:
    """Around the import of a framework: without it one line that says what to install.

    Raises:
        ImportError: the framework is not installed. What its own imports miss is left as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module:
            raise
        raise ImportError(
            f"{package} is not installed; install it first, then qkguard into the same environment."
        ) from None
