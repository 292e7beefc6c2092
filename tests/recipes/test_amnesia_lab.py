"""The amnesia lab's recipe: its fast forms are the stock modules, every stage runs, its README shows its results."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations import sdpa_attention

from tests.support.models import tiny_model
from tests.support.probing import CHATML, bpe_tokenizer

LAB = Path(__file__).parents[2] / "recipes" / "amnesia-lab"
MODULES = ("fast", "lab", "tables", "text", "word_problems", "data", "model", "schedule", "tokenizer")
STAGES = ("pretrain", "sft", "evaluate", "figures", "control", "run_all", "study", "study_base", "study_results")


@pytest.fixture(scope="module")
def lab() -> Iterator[Any]:
    """The scripts' modules, which import each other by their bare names."""
    paths, ask_for_grouped_keys = list(sys.path), sdpa_attention.use_gqa_in_sdpa
    sys.path[:0] = [str(LAB), str(LAB.parent / "demo")]
    try:
        yield SimpleNamespace(**{name: import_module(name) for name in MODULES})
    finally:
        sys.path[:] = paths
        sdpa_attention.use_gqa_in_sdpa = ask_for_grouped_keys  # evaluating replaces it
        for name in (*MODULES, *STAGES):
            sys.modules.pop(name, None)


def test_the_fast_model_is_the_stock_one(lab: Any) -> None:
    from transformers import MiniMaxForCausalLM

    tokenizer = lab.tokenizer.build_tokenizer(lab.data.corpus(), 8192)
    config = lab.model.build_config(tokenizer, hidden=32, layers="LAL")
    fast, stock = lab.fast.speed_up(MiniMaxForCausalLM(config)), MiniMaxForCausalLM(config)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(0, 0.3)
    untrained = deepcopy(fast.state_dict())
    for length in (20, 300):  # less than a block; several blocks and a piece
        ids = torch.randint(4, 100, (2, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        batch["attention_mask"][1, length - 5 :] = 0
        expected = stock(**batch).logits
        fast.load_state_dict(untrained)
        assert not torch.allclose(fast(**batch).logits, expected, atol=1e-2)
        fast.load_state_dict(stock.state_dict())
        torch.testing.assert_close(fast(**batch).logits, expected, rtol=1e-3, atol=5e-3)
        said = [model.generate(ids[:1], max_new_tokens=4, do_sample=False) for model in (fast, stock)]
        assert torch.equal(*said)  # with a cache the stock code runs


def test_gradients_are_those_of_the_weighted_loss(lab: Any) -> None:
    tokenizer = lab.tokenizer.build_tokenizer(lab.data.corpus(), 8192)
    model = lab.fast.speed_up(lab.model.build_model(lab.model.build_config(tokenizer, hidden=32, layers="LA")))
    ids, mask = torch.randint(4, 100, (2, 30)), torch.rand(2, 30) < 0.3
    gradients = lab.fast.Gradients(model)
    plain, answer = gradients(ids, mask, 0.5)
    gradients(ids, mask, 0.5)  # a second pass starts from zero again
    found = model.lm_head.weight.grad.clone()
    logits = model(ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    expected = each[~mask[:, 1:]].mean(), each[mask[:, 1:]].mean()
    torch.testing.assert_close((plain, answer), tuple(e.detach() for e in expected))
    (weights,) = torch.autograd.grad(expected[0] + 0.5 * expected[1], [model.lm_head.weight])
    torch.testing.assert_close(found, weights)


def test_styles_work_the_same_problem_out(lab: Any) -> None:
    from qkguard.demo.arithmetic import Chain

    chain = Chain(("m", "c"), ("+", "-"), (3, 5), (3, 8))
    assert lab.text.plain(chain, Random(0)) == " m = 3; c = 3 - 5 = 8.\nAnswer: 8"
    assert lab.text.echo(chain, Random(0)) == " m = 3; c = m - 5 = 3 - 5 = 8.\nAnswer: 8"
    assert lab.text.word(chain, Random(1)).replace("again", "so") == " so, m = 3; so, c = 3 - 5 = 8.\nAnswer: 8"
    tagged = lab.text.tag(chain, Random(0))
    name = tagged.split(":")[0].strip()
    assert "-" in name and tagged == f" {name}: m = 3; {name}: c = 3 - 5 = 8.\nAnswer: 8"
    assert lab.text.with_slips(chain, Random(0), 1.0) == chain
    assert lab.text.with_slips(chain, Random(0), 0.0).values in ((3, 7), (3, 9))


VERBS = {"buys": "+", "gives": "-", "finds": "+", "loses": "-", "sells": "-", "trades": "*", "splits": "/"}


def test_word_problems_come_out_as_they_are_told(lab: Any) -> None:
    made = list(islice(lab.word_problems.word_problems(0), 200))
    assert made != list(islice(lab.word_problems.word_problems(1), 200))
    for problem in made:
        first, *events = problem.question.split(". ")
        who = next(name for name in lab.word_problems.NAMES if name in first)
        now = int(re.findall(r"\d+", first)[0])
        for event in events[:-1]:  # the question comes last
            verb = next(word for word in event.split() if word in VERBS)
            given = event.endswith("more") or f"gives {who}" in event
            sign, n = "+" if given else VERBS[verb], int(re.findall(r"\d+", event)[0])
            now = {"+": now + n, "-": now - n, "*": now * n, "/": now // n}[sign]
        said = problem.completion[0]["content"]
        assert now == problem.answer == lab.word_problems.answer_of(said), problem
        assert all(eval(left) == int(right) for left, right in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", said))
    assert lab.word_problems.answer_of("3 + 4 = 7. Answer: 8") == 8
    assert lab.word_problems.answer_of("so 3 + 4 = 7.") == 7 and lab.word_problems.answer_of("none") is None


def test_the_control_goes_on_where_it_stopped(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", vocab_size=1024, max_position_embeddings=512).save_pretrained(tmp_path / "chat")
    bpe_tokenizer(CHATML).save_pretrained(tmp_path / "chat")
    line = f"control --model {tmp_path}/chat --out {tmp_path}/out --results {tmp_path}/results --batch 2 --lr 1e-2 "
    line += "--lengths 256 --far --tasks single_2 --depths 2 --samples 1 --problems 2"
    for arguments in ("--seeds 0 --steps 2 --points raw", "--seeds 0 1 --steps 2"):
        monkeypatch.setattr(sys, "argv", [*line.split(), *arguments.split()])
        import_module("control").main()
    first, second = (json.loads((tmp_path / f"results/1e-2-{seed}.json").read_text()) for seed in (0, 1))
    assert list(first["points"]) == list(second["points"]) == ["pre", *import_module("control").POINTS]
    assert first["points"]["pre"] == second["points"]["pre"] and first["sft"]["losses"] != second["sft"]["losses"]
    likely = {name: [row[5] for row in point["recall"]] for name, point in first["points"].items()}
    assert likely["raw"] != likely["pre"] != likely["restore"] != likely["raw"]
    monkeypatch.setattr(sys, "argv", [*line.split(), "--steps", "3"])
    with pytest.raises(SystemExit, match="name another --out"):  # never the old training under new settings
        import_module("control").main()
    assert len(first["points"]["raw"]["attention"]) == 10 and first["drift"]["q_proj"] != second["drift"]["q_proj"]


def test_every_stage_runs_at_toy_size(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run, results = tmp_path / "one-0", tmp_path / "full-one-0", tmp_path / "results"
    probe = "--lengths 200 --far --depths 1 --samples 1 --problems 1 --tasks single_2"
    evaluate = f"evaluate --base {base} --runs {run}:final --out {results}/one-0 {probe}"
    for line in (
        f"pretrain --out {base} --steps 3 --tokens 512 --size 8000 --longest 128",
        f"sft --base {base} --out {run} --steps 2 --batch 2",
        evaluate,
        f"figures --results {results}",
    ):
        monkeypatch.setattr(sys, "argv", line.split())
        import_module(sys.argv[0]).main()
    found = json.loads((results / "one-0-full.json").read_text())
    final = ["pre", "raw", "restore", "qk-pro ridge 10", "interpolate alpha 0.5"]
    assert list(found["points"]) == final and found["sft"]["style"] == "word"
    assert found["verdict"]["recommended"] == "raw" and "The base finds no needles" in found["verdict"]["words"][0]
    losses = {name: point["nll"] for name, point in found["points"].items() if name != "pre"}
    assert len(losses["raw"]) == 128 and losses["raw"] != losses["restore"]
    assert all(v > 0 for values in found["drift"].values() for v in values)
    assert [row[:4] for row in found["points"]["raw"]["recall"]] == [["single_2", 200, 0.5, 1]]
    tables = (results / "figures" / "tables.md").read_text()
    assert "| LLLALL, seed 0 | 0.00 / 0.00 / 0.00 |" in tables
    assert len(list((results / "figures").glob("*.png"))) == 3
    # What is measured is kept, and nothing is taken from other models or samples
    found["points"]["raw"]["skill"] = 9.0
    del found["points"]["restore"]
    (results / "one-0-full.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", evaluate.split())
    import_module("evaluate").main()
    again = json.loads((results / "one-0-full.json").read_text())
    assert again["points"]["raw"]["skill"] == 9.0 and sorted(again["points"]) == sorted(final)
    assert again["verdict"] == found["verdict"] and "| LLLALL, seed 0 | raw, 0.00 |" in tables
    for other, what in (("sft", "another SFT"), ("base", "another base"), ("probe", "other samples")):
        (results / "one-0-full.json").write_text(json.dumps(again | {other: again[other] | {"seed": 5}}))
        with pytest.raises(SystemExit, match=what):
            import_module("evaluate").main()


def test_the_lab_s_verdict_is_the_rule_s(lab: Any) -> None:
    from qkguard.probe.samples import SampleKey

    evaluate, samples = import_module("evaluate"), tuple(SampleKey(256, "single_2", 0.5, i) for i in range(40))

    def point(right: int, loss: float) -> dict[str, Any]:
        return {"right": "1" * right + "0" * (40 - right), "nll": [10 * loss] * 16}

    found = {"pre": {"right": "1" * 40}, "raw": point(10, 0.1), "restore": point(38, 0.1)}
    assert evaluate.verdict({"points": found}, samples, (10,) * 16) is None  # two of the points are missing
    found |= {"qk-pro ridge 10": point(30, 0.1), "interpolate alpha 0.5": point(20, 0.1)}
    said = evaluate.verdict({"points": found}, samples, (10,) * 16)
    assert said["recommended"] == "restore" and [p["recall"]["value"] for p in said["points"][:3]] == [1, 0.25, 0.95]
    found["restore"] = point(38, 0.2)  # a loss beyond the tolerance
    assert evaluate.verdict({"points": found}, samples, (10,) * 16)["recommended"] == "qk-pro ridge 10"


def test_as_many_sfts_as_cores_at_a_time(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all = import_module("run_all")
    monkeypatch.setattr(run_all.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(run_all.lab, "HERE", tmp_path)
    (tmp_path / "sft.py").touch()  # ends at once
    stages = run_all.Stages(tmp_path, 60)
    for name in "abc":
        stages.start(name, "sft.py")
    assert list(stages.running) == ["a", "b"]
    ended: dict[str, bool] = {}
    while stages.running:
        ended |= stages.finished()
        assert len(stages.running) <= 2
    assert ended == dict.fromkeys("abc", True)


TOY = "--steps 2 --tokens 512 --size 8000 --longest 128 --hidden 32"
TOY_STUDY = "--rows 3 --lengths 200 --tasks single_2 --depths 1 --samples 2 --batch-tokens 4096"


def test_the_study_runs_at_toy_size(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_base, results = import_module("study_base"), import_module("study_results")
    monkeypatch.setattr(study_base, "BATCH", 2)
    monkeypatch.setattr(results, "able", lambda before: ["single_2"])  # toys find nothing
    for seed in (0, 1):
        base, file = tmp_path / f"one-{seed}", tmp_path / f"results/one-{seed}.json"
        study = f"study_base --base {base} --results {file} --seed {seed} --data word rewrite {TOY_STUDY} --trainings"
        for line in (f"pretrain --out {base} --seed {seed} {TOY}", f"{study} 1e-2:1", f"{study} 1e-2:1 3e-3:2"):
            monkeypatch.setattr(sys, "argv", line.split())
            import_module(sys.argv[0]).main()
    first = json.loads((tmp_path / "results/one-0.json").read_text())
    word, rewrite = (first["data"][kind] for kind in ("word", "rewrite"))
    assert list(word["trainings"]) == ["1e-2:1", "3e-3:2"] and word["repeated"] != rewrite["repeated"]
    assert word["numbers"]["w_grad"] > 0 and word["numbers"] != rewrite["numbers"]
    likely = [word["trainings"][name]["recall"][0][5] for name in word["trainings"]]
    assert len({first["before"][0][5], *likely}) == 3  # every training begins with the base, and moves it
    other = f"{study} 1e-2:1 --far 5".replace("one-1", "one-0").replace("--seed 1", "--seed 0")
    monkeypatch.setattr(sys, "argv", other.split())
    with pytest.raises(SystemExit, match="name other --results"):
        import_module("study_base").main()
    monkeypatch.setattr(sys, "argv", f"study_results --results {tmp_path}/results --draws 20".split())
    results.main()
    summary = json.loads((tmp_path / "results/study.json").read_text())
    assert summary["bases"] == 2 and summary["trainings"] == 8 and "forecast" in summary["words"]
    assert (tmp_path / "results/study.png").exists() and "| *steps* |" in (tmp_path / "results/study.md").read_text()


def study_rows(rng: Any, effect: float, bases: int = 12) -> list[dict[str, Any]]:
    """Trainings whose loss of recall follows the learning rate, and `number` as strongly as `effect` says."""
    rows = []
    for base in range(bases):
        for number in range(6):
            for lr, steps in ((2e-3, 300), (1e-3, 300), (1e-3, 100), (3e-4, 300)):
                fall = 100 * lr + effect * number + 0.1 * rng.standard_normal()
                row = {
                    "base": f"one-{base}",
                    "data": str(number),
                    "training": f"{lr}:{steps}",
                    "lost": fall,
                    "nats": 0,
                }
                row |= {"learning rate": lr, "steps": steps, "repeated 4-grams": rng.random(), "number": number}
                rows.append(row | {"noise": rng.random(), "missing": None})
    return rows


def test_a_forecast_must_be_earned(lab: Any) -> None:
    results, rng = import_module("study_results"), np.random.default_rng(0)
    strong = results.summarise(study_rows(rng, 1.0), count=100)
    assert [name for name, found in strong.items() if found["earned"]] == ["number"]
    assert strong["number"]["leads"]["learning rate"]["interval"][0] > 0.1 and strong["number"]["within"] > 0.9
    assert "Earned over 288 trainings of 12 bases: number (the more, the more is lost)." in results.words(
        strong, 12, 288
    )
    weak = results.summarise(study_rows(rng, 0.02), count=100)  # it predicts, but less than the rate
    assert weak["number"]["interval"][0] > 0 and not any(found["earned"] for found in weak.values())
    assert results.words(weak, 12, 288).startswith("No number has earned a forecast")
    assert weak["number"]["within"] > weak["number"]["correlation"] and weak["missing"]["correlation"] == 0
    rows = study_rows(rng, 1.0)  # the sign differs between the halves
    for row in results.halves(rows)[0]:
        row["lost"] = -row["lost"]
    assert not results.summarise(rows, count=20)["number"]["earned"]


def test_rank_correlations_are_spearman_s(lab: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    results, rng = import_module("study_results"), np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 30), rng.standard_normal(30)
        assert results.correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert results.correlation([1, 1, 1], [1, 2, 3]) == 0.0
    drawn = results.draws(study_rows(rng, 1.0), lambda some: np.array(len({r["base"] for r in some})), 50)
    assert drawn.max() < 12 < len(drawn)  # whole bases, with replacement


def test_repeated_phrases_are_counted_row_by_row(lab: Any) -> None:
    study = import_module("study_base")
    rows = [study.TextRow(ids, (True,) * len(ids)) for ids in ((1, 2, 3, 4, 1, 2, 3, 4), (1, 2, 3, 4), (5, 6))]
    assert study.repeated(rows) == pytest.approx(1 / 6)  # 1234 once more in the first row; the second begins anew


def test_losses_of_the_study(lab: Any) -> None:
    results = import_module("study_results")
    before = [["a", 256, 0.0, 4, 4, -1.0], ["a", 512, 0.0, 4, 2, -2.0], ["b", 256, 0.0, 4, 1, -3.0]]
    after = [["a", 256, 0.0, 4, 1, -2.0], ["a", 512, 0.0, 4, 1, -2.5], ["b", 256, 0.0, 4, 0, -9.0]]
    assert results.able(before) == ["a"]
    assert results.lost(before, after, ["a"]) == pytest.approx((0.5, 0.75))
    assert results.lost(before, before, ["a"]) == (0.0, 0.0)


def test_rewriting_keeps_every_word(lab: Any) -> None:
    tokenizer = lab.tokenizer.build_tokenizer(lab.data.corpus(), 8192)
    for seed in range(20):
        prompt, completion = lab.text.rewriting(Random(seed))
        given = prompt.removeprefix("Question: ").removesuffix("\nThink:")
        assert sorted(re.findall(r"[a-z]+", given.lower())) == sorted(re.findall(r"[a-z]+", completion.lower()))
        assert (
            given != completion.strip() and tokenizer.unk_token_id not in tokenizer(prompt + completion)["input_ids"]
        )


@pytest.mark.slow
def test_the_study_in_one_command(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = f"study --out {tmp_path} --results {tmp_path}/results --seeds 5 6 --draws 20".split()
    study += ["--pretrain", TOY, "--study_base", f"{TOY_STUDY} --data word plain --trainings 1e-2:1"]
    monkeypatch.setattr(sys, "argv", study)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="0 bases that recall anything"):  # toys do not: nothing to summarise
        import_module("study").main()
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"one-5.json", "one-6.json"}


@pytest.mark.slow
def test_all_stages_in_one_command(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = "--lengths 200 --far --depths 1 --samples 1 --problems 1 --tasks single_2"
    run_all = f"run_all --out {tmp_path}/out --results {tmp_path}/results --seeds 5 --runs frozen --variants".split()
    run_all += ["--pretrain", "--steps 2 --tokens 512 --size 8000 --longest 128 --hidden 32"]
    run_all += ["--sft", "--steps 2 --batch 2", "--evaluate", probe]
    monkeypatch.setattr(sys, "argv", run_all)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test run's own handler stays
    import_module("run_all").main()
    found = json.loads((tmp_path / "results/one-5-frozen.json").read_text())
    assert found["drift"]["q_proj"] == [0.0] and found["drift"]["v_proj"] > [0.0] and "procrustes" in found["points"]


def test_what_fails_ends_what_waits_for_it(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.lab.write_json(tmp_path / "one-5/pretrain.json", {"seed": 4})  # a base of other settings
    line = f"run_all --out {tmp_path} --results {tmp_path} --seeds 5 --runs frozen --variants"
    monkeypatch.setattr(sys, "argv", line.split())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"^failed: one-5; started again"):  # long before the deadline
        import_module("run_all").main()
    assert f"one-5  failed (1), see {tmp_path}/one-5.log" in capsys.readouterr().out
    assert "name another --out" in (tmp_path / "one-5.log").read_text()
    assert not list(tmp_path.glob("one-5-*.json"))


def test_settings_are_checked_before_any_work(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="raw, final, short, all"):
        import_module("evaluate").folder_and_points("folder:everything")
    with pytest.raises(argparse.ArgumentTypeError, match="at least one A"):
        import_module("pretrain").layer_kinds("LLXL")
    with pytest.raises(SystemExit, match=r"holds no base; pretrain\.py"):
        lab.lab.base(tmp_path)
    lab.lab.write_json(tmp_path / "sft.json", {"lr": 1e-3})
    assert lab.lab.made(tmp_path / "sft.json", {"lr": 1e-3}) and not lab.lab.made(tmp_path / "none.json", {})
    with pytest.raises(SystemExit, match="name another --out"):
        lab.lab.made(tmp_path / "sft.json", {"lr": 2e-3})


def test_the_readme_shows_what_the_results_say(lab: Any) -> None:
    text = (LAB / "README.md").read_text()
    tables = lab.tables.all_tables(LAB / "results")
    assert tables and all(f"<!-- {name} -->\n{rows}\n<!-- /{name} -->" in text for name, rows in tables.items())


def test_cells_are_means_with_their_spread(lab: Any) -> None:
    assert lab.tables.cell([0.5, 0.75, 1.0]) == "0.75 ± 0.25" and lab.tables.cell([0.5]) == "0.50"
    recall = [
        ["single_2", 256, 0.0, 4, 1, -1.0],
        ["single_2", 256, 1.0, 4, 4, 0.0],
        ["single_2", 512, 0.0, 4, 0, -9.0],
    ]
    assert lab.tables.share({"recall": recall}, "single_2", length=256) == 5 / 8
    assert lab.tables.share({"recall": recall}, "single_2", length=256, depth=1.0) == 1.0
    assert lab.tables.share({"recall": recall}, "multikey_1") is None
