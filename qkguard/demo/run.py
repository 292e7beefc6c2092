"""The demo from beginning to end: the base, its SFT under guard, the exam of three models, and what came of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkguard.demo.arithmetic import problems
from qkguard.demo.scores import Score, cot_accuracy
from qkguard.demo.settings import DemoSettings
from qkguard.errors import QKGuardError

if TYPE_CHECKING:
    from qkguard.demo.training import Watch
    from qkguard.report.run import Run

MODEL = Path(__file__).parent / "model"
"""The hybrid that ships with the package, as pretraining left it: made by recipes/demo/pretrain.py."""

PICTURE = "demo.png"
REPORT = "demo.json"  # its presence also marks a folder as one that a new demo may replace


@dataclass(frozen=True)
class DemoReport:
    """`scores` of "before", "raw" and "qk_restored", the guard's own files as a `Run`, and where everything lies."""

    out: Path
    settings: DemoSettings
    scores: dict[str, Score]
    losses: list[tuple[int, float]]
    run: Run
    seconds: float

    @property
    def files(self) -> dict[str, Path]:
        final = self.run.folder / "final"
        return {
            "page": self.run.folder / "report.html",
            "picture": self.out / PICTURE,
            "base": self.out / "base",
            "raw": final / "raw",
            "restored": final / "qk_restored",
        }

    @property
    def verdict(self) -> dict[str, Any]:
        """As `metrics.jsonl` has it."""
        return dict(self.run.verdict or {})

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            "settings": asdict(self.settings),
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "losses": self.losses,
            "recall": [[probe.step, probe.recall] for probe in self.run.probes if probe.weights == "raw"],
            "alerts": sum(bool(probe.falls) for probe in self.run.probes),
            "points": {
                point["name"]: {"recall": point["recall"]["value"], "loss": point["task"]["loss"]}
                for point in self.verdict["points"]
                if point["task"] is not None
            },
            "recommended": self.verdict["recommended"],
            "words": self.verdict["words"],
            "files": {name: str(path) for name, path in self.files.items()},
            "seconds": round(self.seconds, 1),
        }


def run_demo(
    out: Path,
    settings: DemoSettings | None = None,
    *,
    model: Path = MODEL,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> DemoReport:
    """CoT-SFT of the packaged hybrid, rescaled, with `QKGuardCallback`; then an exam before, after and restored.

    Recall is what the guard's own probes and verdict measured. Writes `out/base`, `out/_qkguard/` (what the callback
    writes in any run), `out/demo.png` and `out/demo.json`. An earlier demo in `out` is replaced.

    Args:
        watch: opens a progress bar with a label (none by default).
        say: prints a line about the stage that begins (nothing by default).

    Raises:
        QKGuardError: `out` holds something that is not a demo; there is no GPU, or no W&B, where one is asked for.
    """
    settings = settings or DemoSettings()
    watch, say = watch or _unwatched, say or _unsaid
    _check(settings)
    _make_room(out)
    began = time.monotonic()
    from transformers import AutoTokenizer

    from qkguard.demo import show
    from qkguard.demo.base import write_base
    from qkguard.demo.training import fine_tune
    from qkguard.report.run import load_run

    base = out / "base"
    write_base(model, base, settings.factor)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Other problems than those of the training text, which has a seed of its own
    exam = list(islice(problems(settings.seed, settings.problem_lengths), settings.problems))
    say(
        f"1/2 {settings.steps} steps of CoT-SFT on step-by-step arithmetic with TRL's SFTTrainer and "
        "QKGuardCallback, which probes recall on the way"
    )
    losses = fine_tune(base, tokenizer, out, settings, exam, watch)
    run = load_run(out)
    if run.verdict is None:
        raise QKGuardError("The model found no needles before training, so there is no verdict. Probe more samples.")
    say(f"2/2 an exam of {settings.problems} new problems, before SFT, after it and restored")
    folders = {"before": base, "raw": run.folder / "final/raw", "qk_restored": run.folder / "final/qk_restored"}
    points = {"before": "base", "raw": "raw", "qk_restored": f"interpolate alpha {settings.alpha:g}"}
    by_name = {point["name"]: point for point in run.verdict["points"]}
    scores = {}
    for name, folder in folders.items():
        found = by_name[points[name]]["recall_by_length"]
        recall = {int(length): share for length, share in found.items()}
        scores[name] = Score(points[name], recall, cot_accuracy(folder, tokenizer, exam, gpu=settings.gpu))
    show.picture(out / PICTURE, run, scores)
    report = DemoReport(out, settings, scores, losses, run, time.monotonic() - began)
    (out / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n")
    return report


def _check(settings: DemoSettings) -> None:
    from importlib.util import find_spec

    if settings.gpu:
        import torch

        if not torch.cuda.is_available():
            raise QKGuardError("torch finds no GPU here. Leave out --gpu: the demo runs on a CPU too.")
    if settings.wandb and find_spec("wandb") is None:
        raise QKGuardError("wandb is not installed. Install qkguard[wandb], or leave out --wandb.")


def _make_room(out: Path) -> None:
    """An empty folder at `out`; an earlier demo there goes, anything else is refused."""
    if not out.exists():
        out.mkdir(parents=True)
    elif not out.is_dir():
        raise QKGuardError(f"{out} is a file; choose a folder with --out.")
    elif any(out.iterdir()):
        if not (out / REPORT).is_file():
            raise QKGuardError(f"{out} holds something other than a demo; choose another folder with --out.")
        shutil.rmtree(out)
        out.mkdir()
    (out / REPORT).write_text("{}\n")  # an interrupted demo may be replaced as well


@contextmanager
def _unwatched(label: str) -> Iterator[Callable[[int, int], None]]:
    yield _no_bar


def _no_bar(done: int, total: int) -> None:
    pass


def _unsaid(text: str) -> None:
    pass
