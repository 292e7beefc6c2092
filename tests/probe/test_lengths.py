"""Default lengths, and lengths that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qkguard.errors import QKGuardError
from qkguard.probe import Prober, ProbeSettings
from qkguard.probe.settings import check_lengths, default_lengths, hard_limit, soft_limit
from tests.support.models import tiny_model
from tests.support.probing import bpe_tokenizer


def test_learned_positions_are_a_hard_limit() -> None:
    gpt2 = tiny_model("gpt2")
    with pytest.raises(QKGuardError, match=r"learned positions up to 128, .* give lengths up to 112"):
        check_lengths(gpt2, [64, 128])
    assert check_lengths(gpt2, [112]) == [] and hard_limit(gpt2) == 112
    assert hard_limit(tiny_model("llama")) is None


def test_a_context_of_the_hard_limit_can_be_probed() -> None:
    model = tiny_model("gpt2", n_positions=316, vocab_size=1024)
    lengths = [hard_limit(model)]
    assert lengths == [300]
    prober = Prober(bpe_tokenizer(), ProbeSettings(lengths=lengths, depths=1, samples=1, tasks=["s1"]))
    prober.find_formats(model)
    prober.run(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.zeros(1, 317, dtype=torch.long))


def test_rotary_models_are_warned_for() -> None:
    llama = tiny_model("llama")
    (warning,) = check_lengths(llama, [64, 256])
    assert "128" in warning and soft_limit(llama) == 128
    assert check_lengths(llama, [128]) == []


def test_defaults_go_beyond_the_training_length() -> None:
    long = tiny_model("llama", max_position_embeddings=40_000)
    assert default_lengths(long, 8192) == default_lengths(long.config, 8192) == [512, 1024, 2048, 16384, 32768]
    assert default_lengths(long, 16384) == [512, 1024, 2048, 32768]
    assert default_lengths(long, 512) == default_lengths(long) == [512, 1024, 2048]
    assert default_lengths(tiny_model("llama"), 8192) == []
    assert default_lengths(tiny_model("gpt2", n_positions=600)) == [512]
    assert default_lengths(nn.Linear(1, 1), 4096) == [512, 1024, 2048, 8192, 16384]
