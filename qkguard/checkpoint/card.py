"""The model card of a restored folder: README.md with the metadata that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
"""Metadata taken over from the raw folder's card, where it has one."""

OWN_TAGS = ("qkguard", "qk-restore")


def model_card(manifest: Mapping[str, Any], raw_card: str | None = None) -> str:
    """README.md from the manifest; `raw_card` is the text of the raw checkpoint's own card."""
    old, base = _metadata(raw_card), str(manifest["base"].get("id", ""))
    kept = {key: old[key] for key in KEPT if key in old}
    base_model = base if _is_hub_id(base) else old.get("base_model")
    if base_model:
        kept |= {"base_model": base_model, "base_model_relation": "finetune"}
    tags = old.get("tags") or []
    tags = {*(tags if isinstance(tags, list) else [tags]), *OWN_TAGS}
    return _card({**kept, "library_name": "transformers", "tags": sorted(tags)}, _body(manifest, base))


def adapter_card(manifest: Mapping[str, Any], raw_card: str | None = None) -> str:
    """README.md of a restored adapter."""
    old, base = _metadata(raw_card), str(manifest["base"]["id"])
    kept = {key: old[key] for key in KEPT if key in old}
    if _is_hub_id(base):
        kept |= {"base_model": base, "base_model_relation": "adapter"}
    changed = {
        "removed": "query and key modules were removed (`exclude_modules` names them)",
        "rows": "fused modules had the query and key rows of `lora_B` multiplied",
        "scaled": "query and key modules were scaled (`alpha_pattern`)",
    }
    name = base if _is_hub_id(base) else Path(base).name
    lines = ["# Adapter without queries and keys", "", _WHY]
    lines += [f"This is an adapter of `{name}` that leaves them to the base:"]
    lines += [f"- {len(manifest[key])} {text}" for key, text in changed.items() if manifest[key]]
    lines += ["", "`qkguard verify .` checks it against `qkguard.json`.", ""]
    return _card({**kept, "library_name": "peft", "tags": sorted({"lora", *OWN_TAGS})}, "\n".join(lines))


def _card(metadata: Mapping[str, Any], body: str) -> str:
    from huggingface_hub import ModelCardData  # half a second, and not every command writes a card

    # `original_order` keeps ours: the class has one of its own
    data = ModelCardData(**metadata, ignore_metadata_errors=True)
    return f"---\n{data.to_yaml(original_order=list(metadata))}\n---\n\n{body}"


def _metadata(card: str | None) -> dict[str, Any]:
    """The metadata of a card's text; none where it cannot be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not card:
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, YAMLError):  # TypeError: keys that are no text
        return {}


def _body(manifest: Mapping[str, Any], base: str) -> str:
    method = manifest["method"]
    hidden = ("name", "projections", "keep_qk")
    options = ", ".join(f"{k}={v}" for k, v in method.items() if k not in hidden and v is not None)
    layers = manifest["layers"]
    name = base if _is_hub_id(base) else Path(base).name or "unknown"
    title, intro, heading = (_merged if "adapter" in manifest else _restored)(manifest, name)
    lines = [f"# {title}", "", intro, "", f"Options: {options or 'defaults'}.", ""]
    lines += _recall(manifest.get("probe") or {})
    if manifest["warnings"]:
        lines += ["## Warnings", "", *(f"- {sentence}" for sentence in manifest["warnings"]), ""]
    measured = (manifest.get("sweep") or {}).get("words")
    if measured:
        lines += ["## What was measured", "", *(f"- {sentence}" for sentence in measured), ""]
    lines += [
        f"## {heading}",
        "",
        "Relative Frobenius drift of the projection weights, |W - W0| / |W0|.",
        "",
        "| layer | kind | query | key |",
        "|---|---|---|---|",
    ]
    for layer in layers:
        drift = layer.get("drift", {})
        cells = [f"{drift[k]:.3g}" if drift.get(k) is not None else "-" for k in ("q_rel", "k_rel")]
        lines.append(f"| {layer['layer']} | {layer['kind']} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "## Checking it",
        "",
        "`qkguard verify .` recomputes the hashes recorded in `qkguard.json`, which names every restored tensor, its "
        "rows and the versions used.",
        "",
    ]
    return "\n".join(lines)


def _recall(probe: Mapping[str, Any]) -> list[str]:
    """The table of the probes in training: needle recall by length before, raw and restored."""
    names = {"before": "before SFT", "raw": "raw", "restored": "Q/K restored (this model)"}
    shown = {name: probe[name] for name in names if name in probe}
    if "restored" not in shown:
        return []
    lengths = sorted({group["length"] for result in shown.values() for group in result["groups"]})
    rows = [[f"{length:,} tokens", *(_share(r, length) for r in shown.values())] for length in lengths]
    rows.append(["all", *(f"{result['recall']:.2f}" for result in shown.values())])
    settings = shown["restored"]["settings"]
    per_length = sum(g["count"] for g in shown["restored"]["groups"]) // max(1, len(lengths))
    lines = [
        "## Needle recall, probed during training",
        "",
        f"RULER tasks {', '.join(settings['tasks'])}; {per_length} samples a length, teacher-forced, at step "
        f"{shown['restored']['step']}.",
        "",
        f"| | {' | '.join(names[name] for name in shown)} |",
        "|---" * (len(shown) + 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    change = shown["restored"].get("change")
    if change:
        low, high = 100 * change["low"], 100 * change["high"]
        lines += [f"Restored against raw: {100 * change['value']:+.1f} points (95% {low:+.1f} to {high:+.1f}).", ""]
        if change["high"] < 0:
            lines += ["The raw checkpoint has the better recall: it is the one to use.", ""]
    return lines


def _share(result: Mapping[str, Any], length: int) -> str:
    groups = [g for g in result["groups"] if g["length"] == length]
    count = sum(g["count"] for g in groups)
    return f"{sum(g['recall'] * g['count'] for g in groups) / count:.2f}" if count else "-"


def _restored(manifest: Mapping[str, Any], base: str) -> tuple[str, str, str]:
    """(title, first paragraph, heading of the table) of a restored checkpoint's card."""
    name = manifest["method"]["name"]
    if name != "restore":
        return (
            "Fine-tuned model with queries and keys taken towards those before SFT",
            f"{_WHY} In this checkpoint the {_projections(manifest)} projections of {len(manifest['layers'])} "
            f"softmax-attention layer(s) were made from those of the fine-tuned checkpoint and of the base model "
            f"`{base}` with method `{name}`; every other weight is bit for bit that of the fine-tuned checkpoint.",
            "How far SFT had moved them",
        )
    return (
        "Fine-tuned model with its pre-SFT queries and keys",
        f"{_WHY} In this checkpoint the {_projections(manifest)} projections of {len(manifest['layers'])} "
        f"softmax-attention layer(s) were taken back to the base model `{base}` with method `{name}`; every other "
        "weight is bit for bit that of the fine-tuned checkpoint.",
        "How far SFT had moved what was restored",
    )


def _merged(manifest: Mapping[str, Any], base: str) -> tuple[str, str, str]:
    """The same of a merged adapter's card."""
    adapter = manifest["adapter"]["id"]
    adapter = adapter if _is_hub_id(adapter) else Path(adapter).name
    where = f"{_projections(manifest)} projections of {len(manifest['layers'])} softmax-attention layer(s)"
    method = manifest["method"]
    if method["keep_qk"]:
        return (
            "Merged model",
            f"The adapter `{adapter}` merged into the base model `{base}`, the {where} included.",
            "How far the adapter moves queries and keys",
        )
    share = "left out of the merge: their rows are bit for bit the base model's"
    if method["alpha"] < 1:
        share = f"merged with {1 - method['alpha']:g} of the adapter's scaling"
    return (
        "Merged model with its pre-SFT queries and keys",
        f"{_WHY} Here the adapter `{adapter}` was merged into the base model `{base}`; the {where} were {share}.",
        "How far the whole adapter would have moved them",
    )


_WHY = (
    "Chain-of-thought SFT can bend where the softmax-attention layers look and with it long-range recall "
    "([arXiv 2606.11052](https://arxiv.org/abs/2606.11052))."
)


def _projections(manifest: Mapping[str, Any]) -> str:
    return " and ".join({"q": "query", "k": "key"}.get(p, p) for p in manifest["method"]["projections"])


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def read_card(folder: Path) -> str | None:
    """The text of a folder's README.md, if there is one."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
