"""The model card of a restored folder: README.md with the metadata that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
"""Metadata taken over from the raw folder's card, where it has one."""


def model_card(manifest: Mapping[str, Any], raw_card: str | None = None) -> str:
    """README.md from the manifest; `raw_card` is the text of the raw checkpoint's own card."""
    old = _front_matter(raw_card or "")
    base = str(manifest["base"].get("id", ""))
    meta: dict[str, Any] = {key: old[key] for key in KEPT if key in old}
    if _is_hub_id(base):
        meta |= {"base_model": base, "base_model_relation": "finetune"}
    elif old.get("base_model"):
        meta |= {"base_model": old["base_model"], "base_model_relation": "finetune"}
    tags = old.get("tags") or []
    meta["library_name"] = "transformers"
    meta["tags"] = sorted({*(tags if isinstance(tags, list) else [tags]), "qkguard", "qk-restore"})
    return f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n\n{_body(manifest, base)}"


def _body(manifest: Mapping[str, Any], base: str) -> str:
    method = manifest["method"]
    options = ", ".join(f"{k}={v}" for k, v in method.items() if k not in ("name", "parts") and v is not None)
    parts = " and ".join({"q": "query", "k": "key"}.get(p, p) for p in method["parts"])
    layers = manifest["layers"]
    name = base if _is_hub_id(base) else Path(base).name or "unknown"
    lines = [
        "# Fine-tuned model with its pre-SFT queries and keys",
        "",
        "Chain-of-thought SFT can bend where the softmax-attention layers look and with it long-range recall "
        "([arXiv 2606.11052](https://arxiv.org/abs/2606.11052)). In this checkpoint the "
        f"{parts} projections of {len(layers)} softmax-attention layer(s) were taken back to the base model "
        f"`{name}` with method `{method['name']}`; every other weight is bit for bit that of the "
        "fine-tuned checkpoint.",
        "",
        f"Options: {options or 'defaults'}.",
        "",
    ]
    if manifest["warnings"]:
        lines += ["## Warnings", "", *(f"- {sentence}" for sentence in manifest["warnings"]), ""]
    lines += [
        "## How far SFT had moved what was restored",
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


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def read_card(folder: Path) -> str | None:
    """The text of a folder's README.md, if there is one."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
