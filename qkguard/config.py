"""`QKGuardConfig`: every setting of the guard; each field is also a recipe key."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from qkguard.errors import QKGuardError
from qkguard.restore import METHODS

_CHOICES = {
    "method": METHODS,
    "entangled": ("keep", "restore", "refuse"),
    "restore_on": ("save", "best", "end", "never"),
}


@dataclass
class QKGuardConfig:
    """Settings of `QKGuardCallback`; the defaults suit a CoT-SFT run.

    Raises:
        QKGuardError: on a value outside its choices, naming the field, the value and what is accepted.
    """

    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Pre-SFT checkpoint (folder or hub id) whose queries and keys are the reference. Default: the "
            'weights handed to the trainer. "live" takes those without comparing them with their checkpoint\'s files.'
        },
    )
    method: str = field(default="restore", metadata={"help": f"Restore method: {', '.join(METHODS)}."})
    parts: list[str] = field(
        default_factory=lambda: ["q", "k"], metadata={"help": "Which projections to restore, of q and k."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers to restore, counted from 0. Default: every softmax layer."}
    )
    include_norms: bool = field(
        default=False, metadata={"help": "Also restore q/k normalisation gains (the paper restores W_Q and W_K only)."}
    )
    include_sliding_window: bool = field(
        default=True, metadata={"help": "Count sliding-window and chunked softmax layers as softmax attention."}
    )
    entangled: str = field(
        default="keep",
        metadata={
            "help": "Rows that feed keys and values alike (MLA's shared latent): keep (leave them tuned), restore, "
            "or refuse to run."
        },
    )
    spec: str | None = field(
        default=None, metadata={"help": "YAML file with the attention layout, for models that cannot be probed."}
    )
    drift_steps: str = field(
        default="logging",
        metadata={"help": 'Measure Q/K drift every this many steps; "logging" follows logging_steps, 0 is never.'},
    )
    routing_drift_steps: str = field(
        default="100",
        metadata={
            "help": "Measure routing drift and top singular values, which gather one layer at a time, every this many "
            'steps and at the end; "logging" follows logging_steps, 0 is never.'
        },
    )
    restore_on: str = field(
        default="save",
        metadata={
            "help": "When to write the restored checkpoint: every save, best (the best one so far), end (only the "
            "final export) or never."
        },
    )
    final_export: bool = field(
        default=True, metadata={"help": "Write final/raw and final/qk_restored when training ends."}
    )
    merge_at_end: bool = field(
        default=False,
        metadata={
            "help": "With adapters, the final export also writes the merged models final/merged_raw and "
            "final/merged_qk_restored, streamed from the base model's files."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the reference, metrics and final models. Default: <output_dir>/_qkguard."},
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Stop training when a restored write or a tracker fails, instead of logging the error."},
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise QKGuardError(f"{name}={value!r} is not known; expected one of: {', '.join(choices)}")
        self.parts = list(self.parts)
        if not self.parts or set(self.parts) - {"q", "k"}:
            raise QKGuardError(f"parts={self.parts!r} is not known; expected q, k or both")
        if self.layers is not None and not list(self.layers):
            raise QKGuardError("layers=[] restores nothing; leave it out for every softmax layer, or name some")
        for name in ("drift_steps", "routing_drift_steps"):
            value = str(getattr(self, name))
            if value != "logging" and not value.isdigit():
                raise QKGuardError(f'{name}={value!r} is not known; expected a number of steps, 0 or "logging"')
            setattr(self, name, value)

    def due(self, which: str, step: int, logging_now: bool) -> bool:
        """Whether the schedule `which` ("drift_steps", "routing_drift_steps") asks for a measurement at `step`."""
        value = getattr(self, which)
        if value == "logging":
            return logging_now
        return int(value) > 0 and step % int(value) == 0

    @property
    def selection_options(self) -> dict[str, object]:
        """The fields that say which rows are restored, as keyword arguments of `layout.select`."""
        names = ("parts", "layers", "include_norms", "include_sliding_window", "entangled")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
