"""Trainings with recall probes on real ranks: left alone, with one process's numbers, and the live swap of Q and K."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from qkguard import QKGuardCallback, restored
from qkguard.distributed import sharding
from qkguard.probe import Prober, ProbeSettings
from qkguard.probe.passes import undisturbed
from qkguard.training import retrieval_layers
from tests.distributed.cases import STEPS, base_model, deepspeed_config, rank, reset
from tests.distributed.launch import sharded_at_loading, sharding_of
from tests.distributed.lora_cases import lora_config
from tests.support import judge, oracle
from tests.support.models import noised
from tests.support.probing import all_right, bpe_tokenizer, no_floor, with_retrieval_head
from tests.support.training import arguments, make_trainer

PROBES: dict[str, Any] = {"probe_lengths": [192], "probe_depths": 5, "probe_samples": 1, "probe_tasks": ["s1"]}
TINY = {"vocab_size": 1024, "max_position_embeddings": 256}  # llama's embeddings are untied


class BoomError(Exception):
    pass


class Trap:
    """Raises in the middle of every `every`-th forward pass that is not training's, on the chosen rank or on all."""

    def __init__(self, model: nn.Module, every: int, only: int | None = None) -> None:
        self.calls, self.every, self.only, self.sprung = 0, every, only, 0
        layer = next(module for name, module in model.named_modules() if name.endswith("layers.2"))
        self.hook = layer.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            self.calls += 1
            if self.calls % self.every == 0 and self.only in (None, rank()):
                self.sprung += 1
                raise BoomError("in the middle of a probe")


class StaysSharded(TrainerCallback):
    """After the guard's events no parameter is left as FSDP2 gathers it for a forward pass."""

    def check(self, args, state, control, model=None, **kwargs):
        whole = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
        assert not [n for n in whole if "lora_" not in n], whole

    on_train_begin = on_step_end = on_save = on_train_end = check


def run(folder: Path, base: Path, backend: str, guard: Any = None, extra: Any = None, **options: Any) -> Any:
    """A finished training of a tiny untied model; `backend` "loaded_fsdp2" is sharded by transformers at loading."""
    with pytest.MonkeyPatch.context() as patch:
        no_floor(patch)
        return trained(folder, base, backend, guard, extra, **options)


def trained(folder: Path, base: Path, backend: str, guard: Any, extra: Any, **options: Any) -> Any:
    reset()
    settings: dict[str, Any] = {"processing_class": bpe_tokenizer(), "peft_config": options.pop("peft_config", None)}
    resume = options.pop("resume", None)
    if backend.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(backend[-1]), tight=False)
    if backend == "loaded_fsdp2":
        settings["model"], options["save_only_model"] = sharded_at_loading(base), True
    with sharding_of(backend):
        trainer = make_trainer(base, arguments(folder, **options), guard, **settings)
        if backend.endswith("fsdp2"):
            trainer.add_callback(StaysSharded())
        made = extra(trainer) if extra else None
        if isinstance(made, TrainerCallback):
            trainer.add_callback(made)
        trainer.train(resume_from_checkpoint=resume)
    assert (sharding.backend(trainer.model) == "fsdp2") == backend.endswith("fsdp2")
    return trainer, made


def outcome(folder: Path, trainer: Any) -> Any:
    weights = judge.weights_in_bits(folder / f"run/checkpoint-{STEPS}")
    streams = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    return trainer.recorder.rows, weights, streams


def lines_into(lines: list[str]) -> None:
    """Collect what the guard logs."""
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("qkguard").handlers[:] = [handler]


def trained_alike(folder: Path, backend: str, *flags: str) -> None:
    """Without probes, with them at every step and at the save, and with some that raise: bit-identical trainings.

    Flags: lora, dora; older for what torch offered before 2.13.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "older" in flags:
            patch.delattr(FSDPModule, "reset_iter_state", raising=False)
        compare_trainings(folder, backend, flags)


def compare_trainings(folder: Path, backend: str, flags: tuple[str, ...]) -> None:
    base = base_model(folder, "llama", **TINY)
    adapters: dict[str, Any] = {}
    if "lora" in flags or "dora" in flags:
        adapters["peft_config"] = lora_config("llama", flags)
    trainer, _ = run(folder / "bare", base, backend, **adapters)
    expected = outcome(folder / "bare", trainer)
    assert len(expected[0]) == STEPS
    haystack = folder / "prose.txt"
    if rank() == 0:
        haystack.write_text("The cat sat on the mat. The dog went for a walk. Rain fell on the hills all night. " * 9)
    dist.barrier()
    options = PROBES | {"probe_steps": 1, "probe_budget": None, "haystack": str(haystack)}
    guard = QKGuardCallback(strict=True, **options)
    trainer, _ = run(folder / "probed", base, backend, guard, **adapters)
    assert outcome(folder / "probed", trainer) == expected
    if rank() == 0:
        check_numbers(folder / "probed/run", base, haystack, "qk_restored/default" if adapters else "qk_restored")

    lines: list[str] = []

    def trap(trainer: Any) -> Trap:
        lines_into(lines)
        return Trap(trainer.model, 2)

    trainer, sprung = run(folder / "trapped", base, backend, QKGuardCallback(**options), trap, **adapters)
    assert sprung.sprung >= 2 and outcome(folder / "trapped", trainer) == expected
    if rank() == 0:
        told = [line for line in lines if "BoomError" in line and "Training continues" in line]
        assert len(told) == sprung.sprung and any("restored weights" in line for line in told), lines
    dist.barrier()


def check_numbers(folder: Path, base: Path, haystack: Path, restored: str) -> None:
    """The baseline and the last probes of the raw and restored weights are those of one process on saved models."""
    reset()
    kept = json.loads((folder / "_qkguard/probe.json").read_text())["baseline"]
    rows = [row for row in judge.metrics_rows(folder) if row["step"] == STEPS]
    last = {s: next(r for r in rows if f"qkguard/niah{s}/recall" in r) for s in ("", "_restored")}
    raw = folder / f"checkpoint-{STEPS}"
    found = {}
    for name, where in (("base", base), ("raw", raw), ("restored", raw / restored)):
        prober = Prober(
            bpe_tokenizer(),
            ProbeSettings(lengths=[192], depths=5, samples=1, tasks=["s1"], haystack=str(haystack), attention=True),
        )
        prober.load_state({k: kept["settings"][k] for k in ("forms", "forms_seen", "digest")})
        loads = AutoPeftModelForCausalLM if (where / "adapter_config.json").exists() else AutoModelForCausalLM
        found[name] = prober.run(loads.from_pretrained(where))
    alone = found["base"].to_json()
    for mine, other in zip(kept["samples"], alone["samples"], strict=True):
        assert mine[:5] == other[:5] and abs(mine[5] - other[5]) < 1e-5, (mine, other)
    for suffix, want in (("", found["raw"]), ("_restored", found["restored"])):
        assert abs(last[suffix][f"qkguard/niah{suffix}/answer_logprob"] - want.answer_logprob) < 1e-5
        assert abs(last[suffix][f"qkguard/attention{suffix}/needle_mass"] - want.attention.mean("needle")) < 1e-6
    pairs = zip(found["restored"].logprob, found["raw"].logprob, strict=True)
    assert max(abs(a - b) for a, b in pairs) > 1e-4, "raw and restored weights cannot be told apart"
    manifest = json.loads((raw / restored / "qkguard.json").read_text())["probe"]
    assert manifest["raw"]["step"] == manifest["restored"]["step"] == STEPS


def retrieval(folder: Path, backend: str, *flags: str) -> None:
    """`layers="retrieval"`: rank 0 chooses, all restore its layer alone, in the live model too."""
    base = base_model(folder, "llama", **TINY)
    if rank() == 0:
        reset()
        digits = bpe_tokenizer().convert_tokens_to_ids(list("0123456789"))
        model = with_retrieval_head(AutoModelForCausalLM.from_pretrained(base), digits, 2, 1)
        noised(model, seed=1, scale=1e-3).save_pretrained(base)  # DoRA divides by the norm of each row
    dist.barrier()
    is_adapter = "lora" in flags or "dora" in flags
    adapters = {"peft_config": lora_config("llama", flags)} if is_adapter else {}
    settings = {"strict": True, "layers": "retrieval", "verdict": False, "probe_budget": None}
    guard = QKGuardCallback(**PROBES | settings | {"probe_samples": 2})
    with pytest.MonkeyPatch.context() as patch:
        all_right(patch)
        if rank() != 0:
            patch.setattr(retrieval_layers, "choose_layers", None)
        trained(folder, base, backend, guard, None, **adapters)
        chosen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(chosen, (guard.session.retrieval.to_json(), guard.session.weights.rows.layers))
        assert all(found == chosen[0] for found in chosen) and chosen[0][1] == (2,)
        assert max(found["heads"][1] for found in chosen[0][0]["scores"]) > 0.5
        if "resume" in flags:  # the choice is read, not made again from weights that have been trained
            patch.setattr(retrieval_layers, "choose_layers", None)
            later = QKGuardCallback(**PROBES | settings | {"probe_samples": 2})
            trained(folder, base, backend, later, None, **adapters, resume=True, max_steps=2 * STEPS)
            assert later.session.retrieval.to_json() == chosen[0][0] and later.session.weights.rows.layers == (2,)
    if rank() == 0:
        last = 2 * STEPS if "resume" in flags else STEPS
        check_restored(base, folder / f"run/checkpoint-{last}", is_adapter)
        summary = judge.metrics_rows(folder / "run")
        assert [row["retrieval"]["layers"] for row in summary if "retrieval" in row] == [[2]] * (last // STEPS)
    dist.barrier()


def check_restored(base: Path, raw: Path, is_adapter: bool) -> None:
    """Layer 2's queries and keys are the base's; all else is raw's."""
    reset()
    if is_adapter:
        manifest = json.loads((raw / "qk_restored/default/qkguard.json").read_text())
        assert {name.split(".")[2] for name in manifest["removed"]} == {"2"} and manifest["method"]["layers"] == [2]
        return
    before, tuned, found = (oracle.load_folder(where) for where in (base, raw, raw / "qk_restored"))
    restored_names = {name for name, tensor in found.items() if not torch.equal(tensor, tuned[name])}
    assert restored_names == {f"model.layers.2.self_attn.{part}_proj.weight" for part in "qk"}
    assert all(torch.equal(found[name], before[name]) for name in restored_names)
    manifest = json.loads((raw / "qk_restored/qkguard.json").read_text())
    assert manifest["retrieval"]["layers"] == [2] and manifest["probe"]["restored"]["step"] == manifest["step"]


class Swaps(TrainerCallback):
    """At step 2 swaps Q and K before any other forward pass, after some, and with an exception in between."""

    def __init__(self, guard: QKGuardCallback) -> None:
        self.guard = guard
        self.logits: dict[str, Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != 2:
            return
        model, reference = sharding.unwrap(model), self.guard.session.reference
        config = self.guard.session.config
        options = {"method": config.method, **config.method_options}

        def logits() -> Tensor:
            with undisturbed(model):
                return model(input_ids=torch.arange(5, 69)[None], use_cache=False).logits.clone()

        with restored(model, reference, **options):
            self.logits["first"] = logits()
        self.logits["raw"] = logits()
        with restored(model, reference, **options):
            self.logits["second"] = logits()
        trap = Trap(model, 1)
        try:
            with restored(model, reference, **options):
                logits()
        except BoomError:
            pass
        else:
            raise AssertionError("the trap did not work")
        trap.hook.remove()
        with restored(model, reference, **options):
            self.logits["third"] = logits()
        self.logits["raw again"] = logits()
        sharding.settle(model)


def swapped(folder: Path, backend: str, method: str = "restore") -> None:
    """The restored live model gives the logits of the loaded `qk_restored/`, and training does not notice."""
    base = base_model(folder, "llama", **TINY)
    trainer, _ = run(folder / "bare", base, backend)
    expected = outcome(folder / "bare", trainer)
    options: dict[str, Any] = {"method": method} | ({"ridge": 0.5} if method == "qk-pro" else {})
    guard = QKGuardCallback(strict=True, probe_steps=0, **options)
    trainer, swaps = run(folder / "swapped", base, backend, guard, lambda trainer: Swaps(guard), save_steps=1)
    assert outcome(folder / "swapped", trainer) == expected
    if rank() == 0:
        reset()
        for where, names in (("", ("raw", "raw again")), ("/qk_restored", ("first", "second", "third"))):
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/swapped/run/checkpoint-2{where}").eval()
            with torch.no_grad():
                want = model(input_ids=torch.arange(5, 69)[None], use_cache=False).logits
            for name in names:
                assert torch.equal(swaps.logits[name], want), (name, (swaps.logits[name] - want).abs().max())
        assert not torch.equal(swaps.logits["raw"], swaps.logits["first"]), "the swap changed nothing"
    dist.barrier()


def one_rank_fails(folder: Path) -> None:
    """A probe that fails on one rank alone: every rank leaves it, one line says so, training goes on unchanged."""
    base = base_model(folder, "llama", **TINY)
    trainer, _ = run(folder / "bare", base, "ddp")
    expected = outcome(folder / "bare", trainer)
    last = dist.get_world_size() - 1
    lines: list[str] = []

    def trap(trainer: Any) -> Trap:
        lines_into(lines)
        return Trap(trainer.model, 4, only=last)

    guard = QKGuardCallback(**PROBES, probe_steps=1, probe_budget=None)
    trainer, sprung = run(folder / "trapped", base, "ddp", guard, trap)
    assert outcome(folder / "trapped", trainer) == expected
    if rank() == last:
        assert sprung.sprung >= 2
    if rank() == 0:
        told = [line for line in lines if "failed on rank" in line]
        assert told and all(f"rank {last}: BoomError" in line and "Training continues" in line for line in told)
    dist.barrier()
