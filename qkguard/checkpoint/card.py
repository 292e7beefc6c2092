"""The model card of a restored folder: README.md with the metadata that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qkguard.probe.statistics import at_floor
from qkguard.probe.words import change_in_points, floor_clause

KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
"""Metadata taken over from the raw folder's card, where it has one."""

OWN_TAGS = ("qkguard", "qk-restore")


def model_card(manifest: Mapping[str, Any], raw_card: str | None = None) -> str:
    """README.md from the manifest; `raw_card` is the text of the raw checkpoint's own card."""
    old, base = _metadata(raw_card), str(manifest["base"].get("id", ""))
    kept = {key: old[key] for key in KEPT if key in old}
    kept |= _lineage(base, old, "finetune")
    tags = old.get("tags") or []
    tags = [str(tag) for tag in (tags if isinstance(tags, list) else [tags])]
    # PEFT writes "base_model:adapter:/its/local/path"; the hub makes such tags itself
    tags = sorted({*(tag for tag in tags if not tag.startswith("base_model:")), *OWN_TAGS})
    return _card({**kept, "library_name": "transformers", "tags": tags}, _body(manifest, base))


def adapter_card(manifest: Mapping[str, Any], raw_card: str | None = None) -> str:
    """README.md of a restored adapter."""
    old, base = _metadata(raw_card), str(manifest["base"]["id"])
    kept = {key: old[key] for key in KEPT if key in old}
    kept |= _lineage(base, old, "adapter")
    metadata = {**kept, "library_name": "peft", "tags": sorted({"lora", *OWN_TAGS})}
    return _card(metadata, _render("adapter_card", manifest={"verdict": {}, **manifest}, base=_short_name(base)))


def _lineage(base: str, old: Mapping[str, Any], relation: str) -> dict[str, str]:
    """`base_model`, where the manifest or the raw folder's card knows its hub id, and how the model comes from it."""
    for known in (base, old.get("base_model")):
        if isinstance(known, str) and _is_hub_id(known):
            return {"base_model": known, "base_model_relation": relation}
    return {}


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
    names = {"q": "query", "k": "key"}
    return _render(
        "model_card",
        manifest={"probe": {}, "sweep": {}, "verdict": {}, "carried": [], **manifest},
        base=_short_name(base) or "unknown",
        adapter=_short_name(manifest["adapter"]["id"]) if "adapter" in manifest else None,
        projections=" and ".join(names[projection] for projection in method["projections"]),
        options=", ".join(f"{k}={v}" for k, v in method.items() if k not in hidden and v is not None),
    )


def _render(template: str, **values: Any) -> str:
    """What `templates/<template>.md` makes of these values."""
    return str(_templates().get_template(f"{template}.md").render(values))


@cache
def _templates() -> Any:
    """Of Markdown, so nothing is escaped; kept, because compiling a template takes longer than a card does."""
    from jinja2 import Environment, PackageLoader  # not every command writes a card

    environment = Environment(
        loader=PackageLoader("qkguard.checkpoint"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals |= {"recall_at": _recall_at, "drift_of": _drift_of}
    environment.globals |= {"change_in_points": change_in_points, "floor_of": _floor_of}
    return environment


def _recall_at(result: Mapping[str, Any], length: int) -> str:
    """Recall of one probe at one context length, all tasks and depths together; "-" where it was not probed."""
    groups = [g for g in result["groups"] if g["length"] == length]
    count = sum(g["count"] for g in groups)
    return f"{sum(g['recall'] * g['count'] for g in groups) / count:.2f}" if count else "-"


def _floor_of(result: Mapping[str, Any]) -> str | None:
    """What is said of a probe before SFT that can show no loss; None of one that can."""
    count = sum(group["count"] for group in result["groups"])
    hits = round(result["recall"] * count)
    return floor_clause(hits, count, "Before SFT the model") if at_floor(hits, count) else None


def _drift_of(layer: Mapping[str, Any], kind: str) -> str:
    value = layer.get("drift", {}).get(kind)
    return "-" if value is None else f"{value:.3g}"


def _short_name(model: str) -> str:
    """A hub id as it is, else the last part of a path."""
    return model if _is_hub_id(model) else Path(model).name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def read_card(folder: Path) -> str | None:
    """The text of a folder's README.md, if there is one."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
