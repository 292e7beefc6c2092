"""The demo from beginning to end: measure, fine-tune under guard, measure both checkpoints, show."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkguard.demo.arithmetic import Chain, problems
from qkguard.errors import QKGuardError

if TYPE_CHECKING:
    from qkguard.demo.training import Watch

MODEL = Path(__file__).parent / "model"
"""The hybrid that ships with the package: made by recipes/demo/pretrain.py."""

REPORT = "demo.json"  # its presence also marks a folder as one that a new demo may replace
HELDOUT = "heldout.jsonl"


@dataclass(frozen=True)
class DemoSettings:
    """How long and how finely. `lengths` in tokens; `depths` x `samples` needles per task and length."""

    steps: int = 180
    batch: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    lengths: tuple[int, ...] = (256, 1024, 2048)
    depths: int = 5
    samples: int = 4
    tasks: tuple[str, ...] = ("single_2", "multikey_1")
    problems: int = 128
    problem_lengths: tuple[int, int] = (4, 7)


@dataclass(frozen=True)
class DemoReport:
    """`scores` of "before", "raw" and "qk_restored" (`scores.Scores`), and where everything lies."""

    out: Path
    settings: DemoSettings
    scores: dict[str, Any]
    losses: list[tuple[int, float]]
    drift: dict[str, float]
    picture: Path
    raw: Path
    restored: Path
    heldout: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            "settings": asdict(self.settings),
            "scores": {name: scores.to_json() for name, scores in self.scores.items()},
            "losses": self.losses,
            "drift": self.drift,
            "files": {name: str(getattr(self, name)) for name in ("picture", "raw", "restored", "heldout")},
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def run_demo(
    out: Path,
    settings: DemoSettings | None = None,
    *,
    model: Path = MODEL,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> DemoReport:
    """CoT-SFT of the packaged hybrid with `QKGuardCallback`, measured before, after and with Q/K restored.

    Writes `out/_qkguard/` (what the callback writes in any run), `out/drift.png`, `out/demo.json`, and the problems of
    the exam to `out/heldout.jsonl`, for `qkguard sweep`. An earlier demo in `out` is replaced.

    Args:
        watch: opens a progress bar with a label (none by default).
        say: prints a line about the stage that begins (nothing by default).

    Raises:
        QKGuardError: `out` holds something that is not a demo.
    """
    settings = settings or DemoSettings()
    watch, say = watch or _unwatched, say or _unsaid
    _make_room(out)
    from transformers import AutoTokenizer

    from qkguard.demo import show
    from qkguard.demo.scores import Scores, measure
    from qkguard.demo.training import fine_tune
    from qkguard.probe import Prober, ProbeSettings
    from qkguard.report.run import read_metrics

    tokenizer = AutoTokenizer.from_pretrained(model)
    prober = Prober(
        tokenizer,
        ProbeSettings(
            lengths=settings.lengths,
            depths=settings.depths,
            samples=settings.samples,
            tasks=settings.tasks,
            seed=settings.seed,
        ),
    )
    # Other problems than those of the training text, which has a seed of its own
    chains = list(islice(problems(seed=settings.seed, lengths=settings.problem_lengths), settings.problems))
    folders = {
        "before": model,
        "raw": out / "_qkguard" / "final" / "raw",
        "qk_restored": out / "_qkguard" / "final" / "qk_restored",
    }
    scores: dict[str, Scores] = {}
    seconds: dict[str, float] = {}

    def score(name: str) -> None:
        began = time.monotonic()
        loaded = _load(folders[name])
        if name == "before":
            prober.find_formats(loaded)
        with watch(f"probing {show.NAMES[name]}") as progress:
            scores[name] = measure(loaded, tokenizer, prober, chains, progress)
        seconds[name] = time.monotonic() - began

    say("1/3 measuring the model before SFT: needle recall by length, chain-of-thought accuracy")
    score("before")
    say(f"2/3 CoT-SFT: {settings.steps} steps on step-by-step arithmetic with TRL's SFTTrainer and QKGuardCallback")
    began = time.monotonic()
    losses = fine_tune(
        model,
        tokenizer,
        out,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        watch=watch,
    )
    seconds["sft"] = time.monotonic() - began
    say("3/3 measuring the two checkpoints it wrote: raw, and with queries and keys restored")
    score("raw")
    score("qk_restored")
    rows = read_metrics(out / "_qkguard")
    drift = {k: v for row in rows for k, v in row.items() if k.startswith("qkguard/drift/")}
    show.picture(out / "drift.png", rows, scores, f"CoT-SFT of a small hybrid, {settings.steps} steps")
    _write_problems(out / HELDOUT, chains)
    report = DemoReport(
        out,
        settings,
        scores,
        losses,
        drift,
        picture=out / "drift.png",
        raw=folders["raw"],
        restored=folders["qk_restored"],
        heldout=out / HELDOUT,
        seconds=seconds,
    )
    (out / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n")
    return report


def _write_problems(file: Path, chains: Sequence[Chain]) -> None:
    """Rows for `qkguard sweep` whose answer is the whole chain of thought: a slip in one line of it counts."""
    rows = ({"prompt": chain.prompt, "answer": chain.completion} for chain in chains)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


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
