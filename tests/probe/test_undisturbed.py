"""A probe in the middle of training leaves nothing behind, also when it fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qkguard.probe.passes import undisturbed
from qkguard.probe.prober import Prober
from qkguard.probe.settings import ProbeSettings
from tests.support.models import tiny_model
from tests.support.probing import bpe_tokenizer

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def prober(haystack_per: str = "sample") -> Prober:
    asked: dict[str, Any] = {"lengths": [160], "depths": 2, "samples": 1, "tasks": ["s1"], "batch_tokens": 160}
    return Prober(bpe_tokenizer(), ProbeSettings(**asked, haystack_per=haystack_per))


def model_of(name: str = "minimax", **options: Any) -> nn.Module:
    return tiny_model(name, vocab_size=1024, max_position_embeddings=64, attention_dropout=0.2, **options)


def mixed_flags(model: nn.Module) -> nn.Module:
    model.train()
    model.model.layers[1].eval()
    return model


class BoomError(Exception):
    pass


def failing(model: nn.Module) -> Any:
    calls = []

    def hook(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise BoomError

    return model.model.layers[2].register_forward_pre_hook(hook)


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("name", "haystack_per"),
    [("minimax", "sample"), ("minimax", "length"), ("llama", "length"), ("qwen3_next", "length")],
)
def test_states_are_as_they_were(name: str, haystack_per: str, fails: bool) -> None:
    model = mixed_flags(model_of(name))
    model.gradient_checkpointing_enable()
    hook = failing(model) if fails else None
    flags = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    states, config = random_states(), model.config.to_dict()
    registry = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    mine = prober(haystack_per)
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    if fails:
        with pytest.raises(BoomError):
            mine.run(model)
    else:
        mine.find_formats(model)
        mine.run(model)
    assert [m.training for m in model.modules()] == flags and len(set(flags)) == 2
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert random_states() == states and model.config.to_dict() == config
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == registry
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled() and model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())
    if hook is not None:
        hook.remove()
        assert mine.run(model).recall == mine.run(model).recall


def train(between: Callable[[nn.Module], Any], **options: Any) -> tuple[list[float], Tensor]:
    """Six steps with dropout, gradient checkpointing and lengths that cross the rotary embedding's original one."""
    model = model_of("llama", rope_parameters=dict(DYNAMIC), **options)
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(5)
    for step in range(6):
        model.train()
        ids = torch.randint(3, 1000, (2, 40 if step % 2 else 70))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        between(model)
    return [*losses, float(torch.rand(1))], torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_is_bit_identical_with_and_without_probes() -> None:
    def failing_probe(model: nn.Module) -> None:
        hook = failing(model)
        with pytest.raises(BoomError):
            prober().run(model)
        hook.remove()

    def careless(model: nn.Module) -> None:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 160, dtype=torch.long))

    losses, weights = train(lambda model: None)
    for between in (
        lambda model: prober().run(model),
        lambda model: prober("length").run(model),
        lambda model: prober().find_formats(model),
        failing_probe,
    ):
        probed_losses, probed_weights = train(between)
        assert probed_losses == losses and torch.equal(probed_weights, weights)
    assert train(careless)[0] != losses  # the same forward pass without care is felt


def test_adaptive_rotary_embeddings_come_back() -> None:
    model = model_of("llama", rope_parameters=dict(DYNAMIC)).eval()
    rotary = model.model.rotary_emb
    before = (rotary.inv_freq.clone(), rotary.max_seq_len_cached)
    with undisturbed(model):
        model(input_ids=torch.zeros(1, 160, dtype=torch.long))
        assert not torch.equal(rotary.inv_freq, before[0])
    assert torch.equal(rotary.inv_freq, before[0]) and rotary.max_seq_len_cached == before[1]


def test_compiled_models_keep_their_graphs() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    model = model_of("llama").train()
    plain = prober().run(deepcopy(model)).logprob
    model.compile(backend=backend)
    ids = torch.zeros(2, 30, dtype=torch.long)
    model(input_ids=ids, use_cache=False)
    compiled = len(graphs)
    assert compiled > 0
    assert prober().run(model).logprob == pytest.approx(plain, abs=1e-5)
    assert len(graphs) == compiled
    model(input_ids=ids, use_cache=False)
    assert len(graphs) == compiled
    torch.compiler.reset()


def test_buffers_written_in_place_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self) -> None:
            self.seen += 1

    model = Counting()
    buffer = model.seen
    with undisturbed(model):
        model()
        assert model.seen[0] == 1
    assert model.seen is buffer and buffer[0] == 0
