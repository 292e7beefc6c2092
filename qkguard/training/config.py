"""`QKGuardConfig`: every setting of the guard; each field is also a recipe key and an option of `qkguard sft`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from qkguard.errors import QKGuardError, current_names
from qkguard.layout.rows import RETRIEVAL, RowOptions, RowSelection, Shared
from qkguard.restore.registry import DEFAULTS, check_options, get_method
from qkguard.training.checked import STRICT, refusal


def _number(value: Any) -> Any:
    """Text that is a number as that number: "100", as 0.1 took all schedules."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value


def _by_layer(value: Any) -> Any:
    """{"3": "0.5"}, as JSON and the command line have it, as {3: 0.5}."""
    return (
        {_number(layer): _number(strength) for layer, strength in value.items()} if isinstance(value, dict) else value
    )


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, Path) else value


def _path(value: Any) -> Any:
    return Path(value) if value and isinstance(value, str) else value


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError("no such file")
    return file


def _task(name: str) -> str:
    # Imported when a config is made: the probe's modules import transformers' models
    from qkguard.probe.tasks import find_task

    return find_task(name).name


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
DriftSteps = Annotated[Count | Literal["logging"], BeforeValidator(_number)]
ProbeSteps = Annotated[Count | Annotated[float, Field(gt=0, lt=1)] | Literal["eval"], BeforeValidator(_number)]
Share = Annotated[float, Field(gt=0, le=1)]
Folder = Annotated[Path, BeforeValidator(_path)]
File = Annotated[Path, BeforeValidator(_path), AfterValidator(_existing)]
OfLayers = Annotated[dict[Count, float], BeforeValidator(_by_layer)]
AnySequence = Strict(False)  # a tuple or a range is as good as a list; what is in it stays strict


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QKGuardConfig:
    """Settings of `QKGuardCallback`; the defaults suit a CoT-SFT run.

    They are frozen, so that nothing changes unchecked in mid-run; `dataclasses.replace` makes a changed copy, checked
    again. Settings under their names in version 0.1 are accepted with one warning line.

        QKGuardConfig(restore_on="end", probe_steps=0.05, probe_lengths=[1024, 4096])

    Raises:
        QKGuardError: on an unknown setting, a wrong type or a value out of range: one sentence with the setting, the
            value and what it takes.
    """

    base_model: Annotated[str, BeforeValidator(_text)] | None = None
    """Pre-SFT checkpoint (a folder or a hub id, also org/model@revision) whose queries and keys are the reference.
    Default: the weights handed to the trainer. "live" takes those without comparing them with their checkpoint's
    files."""

    method: Literal["restore", "qk-pro", "procrustes", "interpolate", "auto"] = "restore"
    """Restore method. restore takes queries and keys back whole. "auto" writes what the verdict at the end recommends
    as final/qk_restored, and plain restores at saves before. `qkguard sweep` measures more of them."""

    ridge: Annotated[float, Field(ge=0)] = DEFAULTS["ridge"]
    """qk-pro: 0 is restore, larger values keep more of the tuned queries; in units of the mean eigenvalue of the keys'
    Gram matrix."""

    alpha: Annotated[float, Field(ge=0, le=1)] = DEFAULTS["alpha"]
    """interpolate: from 0 (tuned) to 1 (before SFT). For adapters, 1 - alpha of the queries' and keys' scaling
    stays."""

    align: bool = DEFAULTS["align"]
    """interpolate: first rotate the queries and keys from before SFT towards the tuned ones, as far as that leaves
    attention unchanged."""

    per_layer: OfLayers | None = None
    """ridge (qk-pro) or alpha (interpolate) of single layers: {3: 0.5, 7: 1.0}."""

    projections: Annotated[list[Literal["q", "k"]], AnySequence, Field(min_length=1)] = Field(default=["q", "k"])
    """Which projections to restore: q, k or both."""

    layers: Annotated[list[Count], AnySequence] | Literal["retrieval"] | None = None
    """Decoder layers to restore, counted from 0. Default: every softmax layer. "retrieval" are those with a head that
    looks up the needle, as the probe before training finds it; all where it finds none, which is said."""

    include_norms: bool = False
    """Also restore the gains of q/k normalization (the paper restores W_Q and W_K only)."""

    include_sliding_window: bool = True
    """Count sliding-window and chunked softmax layers as softmax attention."""

    shared: Shared = "keep"
    """Rows that feed both keys and values (MLA's shared latent): keep (leave them tuned), restore, or refuse to
    run."""

    spec: File | None = None
    """YAML file with the attention layout, for models whose layout cannot be found automatically."""

    drift_steps: DriftSteps = "logging"
    """Measure Q/K drift every so many steps; "logging" follows logging_steps, 0 is never."""

    routing_drift_steps: DriftSteps = 100
    """Measure routing drift and top singular values, which gather one layer at a time, every so many steps and at the
    end; "logging" follows logging_steps, 0 is never."""

    probe_steps: ProbeSteps = "eval"
    """Probe recall every so many steps, every such fraction of training (0.1), or with every evaluation ("eval"; in a
    run without evaluations every tenth of training). Each of these also probes before the first step and at the end;
    0 is never."""

    probe_lengths: Annotated[list[Positive], AnySequence, Field(min_length=1)] | None = None
    """Context lengths of the probes, in tokens. Default: 512, 1024, 2048, and 2 and 4 times the training max_length,
    as far as the model's max_position_embeddings allows."""

    probe_depths: Positive = 5
    """How many needle depths, evenly spread over the context."""

    probe_samples: Positive = 2
    """Probe samples for every task, length and depth."""

    probe_tasks: Annotated[list[Annotated[str, AfterValidator(_task)]], AnySequence, Field(min_length=1)] = Field(
        default=["single_2", "multikey_1", "multikey_2"]
    )
    """RULER's needle-in-a-haystack tasks to probe with."""

    haystack: File | None = None
    """Text file whose prose hides the needles. Default: the run's own training text where its data set can be read,
    else generated prose."""

    haystack_per: Literal["sample", "length"] = "sample"
    """Whether every probe sample has a haystack of its own, or all of one task and length share one (length). A shared
    one is read once, in less than half the time on a CPU; its samples are less independent than intervals and alerts
    take them to be."""

    probe_budget: Share | None = 0.02
    """Largest share of training time that probes may take. The first, the last and those at saves are planned at the
    start: fewer samples are asked, then fewer lengths, until all fit. The first and the last always run, on at least
    30 samples. Scheduled ones share what is left. None sets no limit."""

    probe_restored: bool = True
    """At saves and at the end, probe the restored weights as well as the raw ones."""

    verdict: bool = True
    """When training ends, measure which model to ship: recall, and the loss on rows of the evaluation set (else of the
    training data), of the raw weights, restore, qk-pro and interpolate at alpha 0.5. Needs probes."""

    tolerance: Annotated[float, Field(ge=0)] = 0.02
    """How much task loss, in nats per token, the model that the verdict recommends may lose against the raw one."""

    recall_alert: Share = 0.10
    """Warn when recall, over all samples, at one length or in one task, falls this far below the probe before
    training, beyond what noise explains: without a change, in at most 5% of trainings. Takes 8 samples of a length or
    task."""

    on_alert: Literal["warn", "save", "stop"] = "warn"
    """What such a fall in recall does: warn, save (a checkpoint at once as well) or stop."""

    restore_on: Literal["save", "best", "end", "never"] = "save"
    """When to write the restored checkpoint: every save, best (the best one so far), end (only the final export) or
    never."""

    final_export: bool = True
    """Write final/raw and final/qk_restored when training ends."""

    merge_at_end: bool = False
    """With adapters, the final export also writes the merged models final/merged_raw and final/merged_qk_restored,
    streamed from the base model's files."""

    output_dir: Folder | None = None
    """Folder for the reference, metrics and final models. Default: <output_dir>/_qkguard."""

    strict: bool = False
    """Stop training when a restored write or a tracker fails, instead of logging the error."""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, given: ArgsKwargs, validate: Callable[[ArgsKwargs], QKGuardConfig]) -> QKGuardConfig:
        """Check arguments under their present names; what is wrong becomes one sentence."""
        settings = current_names(given.kwargs or {})
        try:
            return validate(ArgsKwargs(given.args, settings))
        except ValidationError as error:
            raise refusal(cls, error, settings) from None

    def __post_init__(self) -> None:
        RowSelection.of(self._row_options())
        check_options(self.restore_method, vars(self), self.projections)
        if self.method == "auto":
            self._check_auto()

    def _check_auto(self) -> None:
        """Refuse settings without which there is no verdict, or nothing is written by it."""
        needs = {"verdict": self.verdict, "final_export": self.final_export, "probe_steps": self.probe_steps != 0}
        needs |= {"restore_on": self.restore_on != "never"}
        for name, given in needs.items():
            if not given:
                raise QKGuardError(
                    f'Invalid {name}={getattr(self, name)!r} with method="auto", which writes what is measured when '
                    f"training ends. Leave {name} out, or name a method."
                )

    @property
    def restore_method(self) -> str:
        """The method of restored checkpoints before the verdict."""
        return "restore" if self.method == "auto" else self.method

    @property
    def method_options(self) -> dict[str, object]:
        """The fields that `restore_method` reads, as keyword arguments of `restore_checkpoint`."""
        return {name: getattr(self, name) for name in get_method(self.restore_method).options}

    @property
    def rows(self) -> RowSelection:
        """Which rows are guarded: those that are restored, and with layers="retrieval" those that may be."""
        return RowSelection.of(self._row_options())

    @property
    def wants_retrieval_layers(self) -> bool:
        """Whether the probe before training chooses which of the guarded layers are restored."""
        return self.layers == RETRIEVAL

    def to_json(self) -> dict[str, Any]:
        """All settings as plain values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def _row_options(self) -> Any:
        options = {name: getattr(self, name) for name in RowOptions.__annotations__}
        return options | ({"layers": None} if self.wants_retrieval_layers else {})
