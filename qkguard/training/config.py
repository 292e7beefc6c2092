"""`QKGuardConfig`: every setting of the guard; each field is also a recipe key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowOptions, RowSelection
from qkguard.restore.registry import DEFAULTS, METHODS, check_options, get_method

_CHOICES = {
    "method": METHODS,
    "shared": ("keep", "restore", "refuse"),
    "restore_on": ("save", "best", "end", "never"),
    "on_alert": ("warn", "save", "stop"),
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
    method: str = field(
        default="restore",
        metadata={
            "help": f"Restore method: {', '.join(METHODS)}. `qkguard sweep` measures which suits a run; restore takes "
            "queries and keys back whole."
        },
    )
    ridge: float = field(
        default=DEFAULTS["ridge"],
        metadata={
            "help": "qk-pro: 0 is restore, larger keeps more of the tuned queries; in units of the mean eigenvalue of "
            "the keys' Gram matrix."
        },
    )
    alpha: float = field(
        default=DEFAULTS["alpha"],
        metadata={
            "help": "interpolate: from 0 (tuned) to 1 (before SFT). For adapters, 1 - alpha of the queries' and keys' "
            "scaling stays."
        },
    )
    align: bool = field(
        default=DEFAULTS["align"],
        metadata={
            "help": "interpolate: first rotate the queries and keys from before SFT towards the tuned ones, as far as "
            "attention does not change by it."
        },
    )
    per_layer: dict | None = field(
        default=None,
        metadata={"help": "ridge (qk-pro) or alpha (interpolate) of single layers: {3: 0.5, 7: 1.0}."},
    )
    projections: list[str] = field(
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
    shared: str = field(
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
    probe_steps: str = field(
        default="eval",
        metadata={
            "help": "Probe recall every this many steps, at every such fraction of training (0.1), or with every "
            'evaluation ("eval"; in a run without evaluations every tenth of training). A probe before the first step '
            "and one at the end come with any of these; 0 is never."
        },
    )
    probe_lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Context lengths of the probes, in tokens. Default: 512, 1024, 2048, and 2 and 4 times the "
            "training max_length, as far as the model's max_position_embeddings allows."
        },
    )
    probe_depths: int = field(default=5, metadata={"help": "How many needle depths, evenly spread over the context."})
    probe_samples: int = field(default=2, metadata={"help": "Probe samples for every task, length and depth."})
    probe_tasks: list[str] = field(
        default_factory=lambda: ["single_1", "single_2", "single_3"],
        metadata={"help": "RULER's needle-in-a-haystack tasks to probe with."},
    )
    haystack: str | None = field(
        default=None,
        metadata={
            "help": "Text file whose prose hides the needles. Default: the run's own training text where its data set "
            "can be read, else generated prose."
        },
    )
    probe_budget: float = field(
        default=0.02,
        metadata={
            "help": "Largest share of training time that probes may take: scheduled probes beyond it are left out. "
            "The first and the last probe always run and count too."
        },
    )
    probe_restored: bool = field(
        default=True,
        metadata={"help": "At saves and at the end, probe the restored weights beside the raw ones."},
    )
    recall_alert: float = field(
        default=0.10,
        metadata={
            "help": "Warn when recall falls this far below the probe before training, beyond what noise explains."
        },
    )
    on_alert: str = field(
        default="warn",
        metadata={"help": "What such a fall of recall does: warn, save (a checkpoint at once as well) or stop."},
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
        self.projections = list(self.projections)
        RowSelection.of(self._row_options())
        for name, value in check_options(self.method, vars(self), self.projections).items():
            setattr(self, name, value)
        for name in ("drift_steps", "routing_drift_steps"):
            value = str(getattr(self, name))
            if value != "logging" and not value.isdigit():
                raise QKGuardError(f'{name}={value!r} is not known; expected a number of steps, 0 or "logging"')
            setattr(self, name, value)
        self._check_probes()

    def _check_probes(self) -> None:
        from qkguard.probe.tasks import find_task

        self.probe_steps = str(self.probe_steps)
        if self.probe_steps != "eval" and not self.probe_steps.isdigit() and not _is_fraction(self.probe_steps):
            raise QKGuardError(
                f"probe_steps={self.probe_steps!r} is not known; expected a number of steps, a fraction of training "
                'such as 0.1, "eval", or 0 for never'
            )
        for name in ("probe_depths", "probe_samples"):
            if (number := getattr(self, name)) < 1:
                raise QKGuardError(f"{name}={number} leaves nothing to probe; expected at least 1, or probe_steps=0")
        if self.probe_lengths is not None and (not self.probe_lengths or min(self.probe_lengths) < 1):
            raise QKGuardError(f"probe_lengths={self.probe_lengths} is not known; expected token counts")
        if not self.probe_budget > 0:
            raise QKGuardError(f"probe_budget={self.probe_budget} allows no probe; expected a share above 0")
        if not 0 < self.recall_alert <= 1:
            raise QKGuardError(f"recall_alert={self.recall_alert} is not known; expected a share above 0 and up to 1")
        if not self.probe_tasks:
            raise QKGuardError("probe_tasks=[] leaves nothing to probe; name some, or set probe_steps=0")
        self.probe_tasks = [find_task(task).name for task in self.probe_tasks]

    def due(self, which: str, step: int, logging_now: bool) -> bool:
        """Whether the schedule `which` ("drift_steps", "routing_drift_steps") asks for a measurement at `step`."""
        value = getattr(self, which)
        if value == "logging":
            return logging_now
        return int(value) > 0 and step % int(value) == 0

    @property
    def method_options(self) -> dict[str, object]:
        """The fields that `method` reads, as keyword arguments of `restore_checkpoint`."""
        return {name: getattr(self, name) for name in get_method(self.method).options}

    @property
    def rows(self) -> RowSelection:
        """Which rows are restored."""
        return RowSelection.of(self._row_options())

    def _row_options(self) -> Any:
        return {name: getattr(self, name) for name in RowOptions.__annotations__}


def pace(steps: str) -> str:
    """A drift schedule in words."""
    return {"logging": "every logging step", "0": "never", "1": "every step"}.get(steps, f"every {steps} steps")


def _is_fraction(value: str) -> bool:
    try:
        return 0 < float(value) < 1
    except ValueError:
        return False
