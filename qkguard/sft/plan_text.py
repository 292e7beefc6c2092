"""The plan of a dry run in lines, one subject each."""

from __future__ import annotations

from typing import Any

from qkguard.layout.selection import show_layers
from qkguard.report.numbers import human_bytes, number
from qkguard.training.probe_schedule import pace


def lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """(subject, sentence) for everything in a plan (`qkguard.sft.plan.plan`)."""
    guard, files = plan["guard"], plan["files"]
    guarded = (
        f"{len(guard['layers'])} softmax-attention layers ({show_layers(guard['layers'])}): {guard['elements']:,} "
        f"query and key elements in {guard['parameters']} parameters"
    )
    out = [("model", _model(plan["model"])), ("data", _data(plan["data"])), ("training", _training(plan))]
    out += [("guard", guarded), ("reference", _reference(plan))]
    drift = f"{pace(guard['drift_steps'])}, routing drift {pace(guard['routing_drift_steps'])}, to {files['metrics']}"
    out += [("drift", drift), ("probes", _probes(plan["probes"])), ("checkpoints", _checkpoints(files))]
    if plan["memory"]:
        out.append(("memory", _memory(plan["memory"])))
    return out


def _model(model: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in model["layer_kinds"].items())
    text = f"{model['name']} ({model['type']}): {kinds}"
    if model["parameters"] is not None:
        text += f", {_count(model['parameters'])} parameters"
    if model["adapter"] and model["trained"]:
        text += f", of which none is trained, and {_count(model['trained'])} in adapters"
    return text


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _data(data: dict[str, Any]) -> str:
    rows = "an unknown number of" if data["rows"] is None else f"{data['rows']:,}"
    text = f"{' + '.join(data['sources'])}: {rows} rows ({data['form']})"
    tokens = data["tokens"]
    if tokens["median"]:
        text += (
            f"; of {data['looked_at']} looked at, median {tokens['median']:,} tokens, longest {tokens['longest']:,}"
        )
    return text


def _training(plan: dict[str, Any]) -> str:
    data, processes = plan["data"], plan["processes"]
    steps = "an unknown number of" if data["steps"] is None else f"{data['steps']:,}"
    limit = "any number of" if data["max_length"] is None else f"up to {data['max_length']:,}"
    packed = ", packed" if data["packing"] else ""
    ranks = "1 process" if processes == 1 else f"{processes} processes"
    return f"{steps} steps of {data['batch']} sequences of {limit} tokens{packed}, on {ranks}"


def _reference(plan: dict[str, Any]) -> str:
    if plan["model"]["adapter"]:
        return "the frozen base itself: adapters never change its queries and keys"
    size = human_bytes(plan["guard"]["reference_bytes"])
    return f"{size} of CPU memory over all processes, and as much on disk: {plan['files']['reference']}"


def _checkpoints(files: dict[str, Any]) -> str:
    restored = files["restored"] or ("none before the end" if files["final"] else "none")
    final = f"; at the end {files['final']}/{{raw,qk_restored}}" if files["final"] else ""
    return f"raw {files['raw']}, restored {restored}{final}"


def _memory(memory: dict[str, Any]) -> str:
    parts = ", ".join(f"{key} {human_bytes(memory[key])}" for key in ("weights", "gradients", "optimizer"))
    return (
        f"{human_bytes(memory['per_process'])} per process under {memory['arrangement']} ({parts}; "
        f"{memory['per_trained_parameter']} bytes a trained parameter), activations on top"
    )


def _probes(probes: dict[str, Any]) -> str:
    if probes["off"]:
        return f"off: {probes['off']}"
    when = f"probe_steps={probes['schedule']}"
    if probes["every"]:
        when = f"every {probes['every']} steps ({probes['count']} times)"
    text = (
        f"{', '.join(probes['tasks'])} at {', '.join(map(str, probes['lengths']))} tokens: {probes['samples']} "
        f"samples, {probes['tokens']:,} tokens a pass; before the first step, {when}, at saves and at the end"
    )
    if probes["share_of_training"] is not None:
        text += f"; a pass costs about {number(100 * probes['share_of_training'])}% of the training's arithmetic"
        if probes["count"] and probes["budget"] and probes["within_budget"] < probes["count"]:
            text += f", so probe_budget={probes['budget']:g} leaves room for about {probes['within_budget']} of them"
    return text
