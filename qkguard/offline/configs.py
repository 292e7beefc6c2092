"""Configurations side by side: may the queries and keys of one model be put into the other, and what differs?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qkguard.errors import QKGuardError
from qkguard.layout.cache import cached

GEOMETRY = (
    *("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "layer_types"),
)
POSITIONS = ("rope", "rotary", "position", "sliding_window", "window_layers", "chunk")
"""Parts of the names of keys that say how positions are seen."""

HARMLESS = frozenset(
    {
        # where it comes from, how it is held and run
        *("model_type", "_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version"),
        *("dtype", "torch_dtype", "quantization_config", "use_cache", "torchscript", "use_kernels", "pretraining_tp"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "use_mamba_kernels"),
        *("_experts_implementation", "experts_implementation", "ep_size", "unsloth_version", "unsloth_fixed"),
        # outputs, labels, generation
        *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params"),
        *("max_length", "min_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_beams"),
        *(
            "repetition_penalty",
            "is_decoder",
            "chunk_size_feed_forward",
            "pruned_heads",
            "prefix",
            "is_encoder_decoder",
        ),
        # training alone
        *("gradient_checkpointing", "initializer_range", "initializer_factor", "router_aux_loss_coef"),
        *("router_z_loss_coef", "router_jitter_noise", "input_jitter_noise", "aux_loss_alpha", "seq_aux"),
        # the vocabulary, and layers beside the model proper
        *("vocab_size", "tie_word_embeddings", "num_nextn_predict_layers", "mtp_num_hidden_layers"),
    }
)
HARMLESS_ENDS = ("_token_id", "_token_ids", "_token_index", "dropout", "_pdrop", "dropout_prob", "_config")
"""`..._config`: the towers beside the language model, whose own config is merged into the rest; not `attn_config`."""
ATTENTION_CONFIG = re.compile(r"att(n|ention)")

Flat = dict[str, Any]
UNSET = object()


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint, of the language model where it is nested."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config | config.get("text_config", {})
    except FileNotFoundError:
        raise QKGuardError(f"{folder} has no config.json: expected a checkpoint with its configuration.") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise QKGuardError(f"{folder / 'config.json'} cannot be read ({error}). Save it again.") from None


def compare_configs(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    """One line for every key in which two configs differ, but for those known to be harmless to queries and keys.

    A key that only one of them has is compared with the model class's own default.

    Raises:
        QKGuardError: another architecture, or other head counts and sizes.
    """
    kinds = [str(c.get("model_type")).removesuffix("_text") for c in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise QKGuardError(
            f"The base is a {base.get('model_type')} model, the tuned one {tuned.get('model_type')}: expected the "
            "checkpoint that the tuned model started from."
        )
    for key in GEOMETRY:
        if key in base and key in tuned and base[key] != tuned[key]:
            raise QKGuardError(
                f"{key} is {base[key]} in the base and {tuned[key]} in the tuned model: "
                "expected the checkpoint that the tuned model started from."
            )
    return [_line(key, before, after) for key, before, after in _differences(base, tuned)]


def _differences(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the base, value in the tuned config), `UNSET` for none."""
    base, tuned = _decoded(base), _decoded(tuned)
    before, after = _flat(base), _flat(tuned)
    if before.keys() != after.keys():
        with_defaults = [_with_defaults(config) for config in (base, tuned)]
        if all(config is not None for config in with_defaults):
            before, after = (_flat(config) for config in with_defaults if config is not None)
    for key in sorted(before.keys() | after.keys()):
        values = before.get(key, UNSET), after.get(key, UNSET)
        if values[0] != values[1] and {id(UNSET), id(None)} != {id(value) for value in values}:
            yield key, *values


def _decoded(value: Any) -> Any:
    """Infinity and NaN as floats, which transformers writes as {"__float__": "Infinity"}; the rest as it is."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list | tuple) else value


def _flat(config: Mapping[str, Any], above: str = "") -> Flat:
    """The keys that may matter, those of nested dicts joined with dots."""
    out: Flat = {}
    for key, value in config.items():
        if key in HARMLESS or (key.endswith(HARMLESS_ENDS) and not _of_attention(key)):
            continue
        if isinstance(value, Mapping):
            out |= _flat(value, f"{above}{key}.")
        else:
            out[above + key] = value
    return out


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config with the defaults of its class, under today's names; None where transformers has no such class."""
    if "auto_map" in config:
        return None
    plain = {key: value for key, value in config.items() if not key.endswith("_config") or _of_attention(key)}

    def find() -> dict[str, Any] | None:
        from transformers import CONFIG_MAPPING
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            values = CONFIG_MAPPING[plain["model_type"]].from_dict(plain).to_dict()
            return json.loads(json.dumps(values))
        except Exception:  # the class's own checks, of whatever kind
            return None
        finally:
            logging.set_verbosity(level)

    return cached("config", plain, find)


def _of_attention(key: str) -> bool:
    """Whether a key holds a config of the attention itself (MPT, DBRX, Kimi), not of a tower or of dropout."""
    return key.endswith("_config") and ATTENTION_CONFIG.search(key) is not None


def _line(key: str, before: Any, after: Any) -> str:
    what = "for other positions" if any(part in key for part in POSITIONS) else "with the base's value"
    return (
        f"{key} is {_shown(before)} in the base but {_shown(after)} in the tuned model: the base's queries and keys "
        f"were trained {what}"
    )


def _shown(value: Any) -> str:
    text = "not set" if value is UNSET else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
