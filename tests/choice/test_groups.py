"""Every row of every weight is in exactly one group, and in the right one: against lists written by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from qkguard.choice.groups import TITLES, WeightGroup, find_groups, weights_of
from qkguard.layout import find_attention
from tests.support import models, zoo

Rules = list[tuple[str, str]]
NORMS: Rules = [("norms", r"norm|embed|lm_head|wte|wpe|ln_f|ln_\d")]
DENSE: Rules = [*NORMS, ("mlp", r"\.mlp\.")]
ATTENTION: Rules = [("qk", r"self_attn\.[qk]_proj"), ("vo", r"self_attn\.([vo]_proj|out_proj)")]
GATED: Rules = [  # four heads of 16 query rows, then 16 rows of the gate
    ("qk", r"self_attn\.q_proj\.weight\[0:16, 32:48, 64:80, 96:112\]"),
    ("other", r"self_attn\.q_proj\.weight\[16:32, 48:64, 80:96, 112:128\]"),
    ("qk", r"self_attn\.k_proj"),
    ("vo", r"self_attn\.[vo]_proj"),
]
LATENT: Rules = [
    ("shared", r"kv_a_proj_with_mqa\.weight\[0:24\]"),
    ("qk", r"kv_a_proj_with_mqa\.weight\[24:32\]"),
    ("vo", r"kv_b_proj\.weight\[16:36, 52:72, 88:108, 124:144\]"),
    ("qk", r"kv_b_proj\.weight\[0:16, 36:52, 72:88, 108:124\]"),
    ("qk", r"self_attn\.q_(a_|b_)?proj"),
    ("vo", r"self_attn\.o_proj"),
]
BY_HAND: dict[str, Rules] = {
    "llama": [*DENSE, *ATTENTION],
    "qwen2": [*DENSE, *ATTENTION],
    "qwen3": [*DENSE, *ATTENTION],
    "phi3": [*DENSE, ("qk", r"qkv_proj\.weight\[0:96\]"), ("vo", r"qkv_proj\.weight\[96:128\]|o_proj")],
    "gpt2": [*DENSE, ("qk", r"c_attn\.(weight|bias)\[0:128\]"), ("vo", r"c_attn.*\[128:192\]|attn\.c_proj")],
    "gpt_neox": [
        *DENSE,
        ("qk", r"query_key_value\.(weight|bias)\[0:32, 48:80, 96:128, 144:176\]"),
        ("vo", r"query_key_value\.(weight|bias)\[32:48, 80:96, 128:144, 176:192\]|attention\.dense"),
    ],
    "minimax": [
        *NORMS,
        ("mlp", r"\.mlp\.|block_sparse_moe"),
        ("mixers", r"layers\.[02]\.self_attn"),
        *ATTENTION,
    ],
    "qwen3_next": [*DENSE, ("mixers", r"linear_attn"), *GATED],
    "qwen3_5_text": [*DENSE, ("mixers", r"linear_attn"), *GATED],
    "olmo_hybrid": [*DENSE, ("mixers", r"linear_attn"), *ATTENTION],
    "granitemoehybrid": [*NORMS, ("mixers", r"\.mamba\."), ("mlp", r"shared_mlp|block_sparse_moe"), *ATTENTION],
    "zoo jamba": [*NORMS, ("mixers", r"\.mamba\."), ("mlp", r"feed_forward"), *ATTENTION],
    "zoo lfm2_moe": [*NORMS, ("mixers", r"\.conv\."), ("mlp", r"feed_forward"), *ATTENTION],
    "zoo falcon_h1": [*NORMS, ("mixers", r"\.mamba\."), ("mlp", r"feed_forward"), *ATTENTION],
    "zoo qwen3_5_moe_text": [*DENSE, ("mixers", r"linear_attn"), *GATED],
    "zoo zamba": [
        *NORMS,
        ("mlp", r"shared_transf\.feed_forward"),
        ("qk", r"shared_transf\.self_attn\.[qk]_proj"),
        ("vo", r"shared_transf\.self_attn\.[vo]_proj"),
        ("mixers", r"mamba"),
        ("other", r"layers\.\d+\.linear\.weight"),
    ],
    "zoo deepseek_v3": [*DENSE, *LATENT],
    "zoo gpt_oss": [*DENSE, ("other", r"sinks"), *ATTENTION],
    "zoo bloom": [
        *DENSE,
        ("qk", r"query_key_value.*\[0:32, "),
        ("vo", r"query_key_value.*\[32:48, |self_attention\.dense"),
    ],
}


def groups_of(name: str, **options: Any) -> tuple[torch.nn.Module, list[WeightGroup]]:
    model = zoo.tiny_model(name.removeprefix("zoo ")) if name.startswith("zoo ") else models.tiny_model(name)
    return model, find_groups(model, find_attention(model), **options)


def misplaced(groups: list[WeightGroup], rules: Rules) -> list[str]:
    """Parts that the first rule that speaks of them puts elsewhere, or that no rule speaks of."""
    found = []
    for group in groups:
        for part in group.parts:
            wanted = next((key for key, pattern in rules if re.search(pattern, str(part))), None)
            if wanted != group.key:
                found.append(f"{part} is {group.key}, not {wanted}")
    return found


@pytest.mark.parametrize("name", BY_HAND)
def test_every_row_is_in_the_right_group(name: str) -> None:
    model, groups = groups_of(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert misplaced(groups, BY_HAND[name]) == []
    assert misplaced(groups, [("vo" if key == "qk" else key, pattern) for key, pattern in BY_HAND[name]])

    marks = {key: torch.zeros_like(tensor, dtype=torch.float32) for key, tensor in weights_of(model).items()}
    for group in groups:
        assert group.elements == sum(part.take(marks[part.name]).numel() for part in group.parts)
        for part in group.parts:
            part.put(marks[part.name], marks[part.name] + 1)
    assert all((mark == 1).all() for mark in marks.values()), "each element once"
    assert [group.key for group in groups] == [key for key in TITLES if key in {group.key for group in groups}]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_tied_embeddings_are_one_weight() -> None:
    for tied in (True, False):
        model = models.tiny_model("llama", tie_word_embeddings=tied)
        (norms,) = (group for group in find_groups(model, find_attention(model)) if group.key == "norms")
        names = {part.name for part in norms.parts}
        assert "model.embed_tokens.weight" in names and ("lm_head.weight" in names) is not tied


def test_norms_and_shared_rows_follow_what_is_restored() -> None:
    def names(model_name: str, key: str, **options: Any) -> set[str]:
        _, groups = groups_of(model_name, **options)
        return {str(part) for group in groups if group.key == key for part in group.parts}

    norm = "model.layers.0.self_attn.q_norm.weight"
    assert norm in names("qwen3", "norms") and norm in names("qwen3", "qk", include_norms=True)
    assert norm not in names("qwen3", "norms", include_norms=True)
    latent = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert latent in names("zoo deepseek_v3", "qk", shared="restore"), "whole"
    assert names("zoo deepseek_v3", "shared") and not names("zoo deepseek_v3", "shared", shared="restore")


def test_another_tower_is_no_part_of_the_language_model() -> None:
    model, groups = groups_of("zoo got_ocr2")
    towers = {name for name in weights_of(model) if re.search("vision|projector", name)}
    other = {part.name for group in groups if group.key == "other" for part in group.parts}
    assert towers and other == towers
