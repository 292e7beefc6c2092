"""The study: does a diagnosis before SFT predict how much recall is lost? Twelve bases and every kind of data.

    python recipes/amnesia-lab/study.py --out runs --results runs/results/study

Bases are pretrained side by side (pretrain.py), each is diagnosed on every kind of data and trained on it at several
rates (study_base.py), and study_results.py makes a table, a figure and study.json of it. It is meant for two GPUs and
a quarter of an hour; what lies finished is not made again, and the bases may be those of run_all.py. Run it a second
time with other --seeds, into other folders: what is claimed must have the same sign there.
"""

from __future__ import annotations

from pathlib import Path

import lab
from run_all import Stages, check_finished, run_stages
from tables import study_table

SEEDS = list(range(101, 113))  # nothing was chosen on them


def options():
    parser = lab.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--results", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="one base each")
    parser.add_argument("--deadline", type=float, default=3600, help="seconds, then what still runs is ended")
    parser.add_argument("--draws", type=int, help="bootstrap draws of study_results.py")
    for stage in ("pretrain", "study_base"):
        text = f"further options of {stage}.py, in one word: --{stage}='--seed 1'"
        parser.add_argument(f"--{stage}", type=str.split, default=[], metavar="OPTIONS", help=text)
    return parser


def run(args, stages: Stages) -> None:
    """All bases at once; each goes on to its study when it is there."""
    for seed in args.seeds:
        stages.start(f"one-{seed}", "pretrain.py", "--out", args.out / f"one-{seed}", "--seed", seed, *args.pretrain)
    while stages.running:
        for name, well in stages.finished().items():
            if well and name.startswith("one-"):
                where = ["--base", args.out / name, "--results", args.results / f"{name}.json"]
                seed = ["--seed", name.removeprefix("one-")]
                stages.start(f"study-{name}", "study_base.py", *where, *seed, *args.study_base)


def main() -> None:
    args = options().parse_args()
    stages = run_stages(run, args)
    from study_results import DRAWS, evaluate  # matplotlib, which the processes do without

    summary = evaluate(args.results, args.draws or DRAWS)
    print(summary["words"], study_table(summary["predictors"]["lost"]), sep="\n")
    check_finished(stages)


if __name__ == "__main__":
    main()
