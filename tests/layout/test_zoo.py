"""Every causal-LM type of transformers at tiny size: its row map against what its own attention does.

The judge is independent of the package: it changes rows and watches queries, keys and values in transformers'
attention function, or the probabilities where a type computes its softmax itself.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING

from docs.supported_models import TARGET, describe_specs
from qkguard.errors import UnknownLayoutError
from qkguard.layout import AttentionSpec, Block, find_attention
from tests.support import zoo

DOCUMENT = TARGET.read_text(encoding="utf-8").splitlines()

RECURRENT = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")
REFUSED = dict.fromkeys(RECURRENT, "recurrent throughout") | {
    "reformer": "hash buckets",
    # drafting heads that take queries from another model's states, not from text
    "gemma4_assistant": "cannot be built",
    "gemma4_unified_assistant": "shared_kv_states",
}
if importlib.util.find_spec("timm") is None:
    REFUSED["gemma3n"] = "requires the timm library"
# Rows that feed keys and values alike, beyond gains of norms: MLA's latent, DeepSeek-V4's shared key-value.
PARTIAL = {
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots3_note"),
    *("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_linear", "longcat_flash", "minicpm3", "youtu"),
}
# Types that compute their softmax themselves, whatever attention function the config names.
EAGER = {
    *("big_bird", "bloom", "codegen", "cpmant", "falcon", "git", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "mvp"),
    *("megatron-bert", "openai-gpt", "prophetnet", "rembert", "roformer", "trocr", "xglm", "xlm", "xlnet"),
}
# Parameters that add to the scores without making queries or keys: relative positions, segments.
SCORES = {
    "ProphetNetForCausalLM": ("relative_pos_embeddings.weight", "relative_pos_embeddings.bias"),
    "XLNetLMHeadModel": ("rel_attn.r", "r_r_bias", "r_s_bias", "seg_embed"),
}
PINNED = Version("5.23")  # the transformers whose types docs/SUPPORTED_MODELS.md lists
HEAD = 16
# Row orders of the types above that fuse their projections, by hand: (role, head) of every 16 rows; "" for values.
FUSED = {
    "bloom": [("q", 0), ("k", 0), "", ("q", 1), ("k", 1), "", ("q", 2), ("k", 2), "", ("q", 3), ("k", 3), ""],
    "codegen": [("q", 0), "", ("k", 0), ("q", 1), "", ("k", 1), ("q", 2), "", ("k", 2), ("q", 3), "", ("k", 3)],
    "falcon": [("q", 0), ("q", 1), ("q", 2), ("q", 3), ("k", 0), ""],
    "gpt_neox_japanese": [
        ("q", 0),
        ("k", 0),
        "",
        ("q", 1),
        ("k", 1),
        "",
        ("q", 2),
        ("k", 2),
        "",
        ("q", 3),
        ("k", 3),
        "",
    ],
    "mpt": [("q", 0), ("q", 1), ("q", 2), ("q", 3), ("k", 0), ("k", 1), ("k", 2), ("k", 3), "", "", "", ""],
    "openai-gpt": [("q", 0), ("q", 1), ("q", 2), ("q", 3), ("k", 0), ("k", 1), ("k", 2), ("k", 3), "", "", "", ""],
}


@pytest.mark.parametrize("model_type", sorted(zoo.CONFIGS))
def test_type(model_type: str) -> None:
    if model_type in REFUSED:
        with pytest.raises(UnknownLayoutError, match=REFUSED[model_type]):
            find_attention(zoo.tiny_config(model_type))
        assert any(line.startswith(f"| {model_type} | refused | ") for line in DOCUMENT)
        return
    model = zoo.tiny_model(model_type, "eager" if model_type in EAGER else zoo.ORACLE)
    specs = find_attention(model)
    assert "| {} | {} | {} |".format(model_type, *describe_specs(specs)) in DOCUMENT, "python docs/supported_models.py"
    shared_rows = any(b.shared for s in specs for p in s.params for b in p.blocks if p.kind != "norm")
    assert shared_rows == (model_type in PARTIAL)
    assert len({p.name for s in specs for p in s.params}) == len({(p.name, p.blocks) for s in specs for p in s.params})
    (judge_eager if model_type in EAGER else judge)(model, specs)
    if model_type in FUSED:
        check_fused(specs, FUSED[model_type])


def swapped(block: Block) -> Block:
    return replace(block, role={"q": "k", "k": "q"}.get(block.role, block.role))


def shortened(block: Block) -> Block:
    return replace(block, stop=block.stop - 1) if block.head == 1 else block


def widened(block: Block) -> Block:
    """Reaches into the rows after: the output gate's in Qwen3-Next, the values' in BLOOM."""
    return replace(block, stop=block.stop + 1) if (block.head, block.role) in ((0, "q"), (0, "k")) else block


@pytest.mark.parametrize("damage", [swapped, shortened, widened])
@pytest.mark.parametrize("model_type", ["qwen3_next", "bloom"])
def test_the_judges_see_a_wrong_map(model_type: str, damage: Callable[[Block], Block]) -> None:
    """The twin of `test_type`: it must fail with a row too few, one too many, or queries taken for keys."""
    model = zoo.tiny_model(model_type, "eager" if model_type in EAGER else zoo.ORACLE)
    right = find_attention(model)
    wrong = []
    for spec in right:
        params = []
        for param in spec.params:
            blocks = [damage(block) for block in param.blocks]
            edges = [block.start for block in blocks[1:]] + [param.shape[param.dim]]
            blocks = [replace(b, stop=min(b.stop, edge)) for b, edge in zip(blocks, edges, strict=True)]
            params.append(replace(param, blocks=tuple(blocks)))
        wrong.append(replace(spec, params=tuple(params)))
    with pytest.raises(AssertionError):
        (judge_eager if model_type in EAGER else judge)(model, wrong)
        if model_type in FUSED:
            check_fused(wrong, FUSED[model_type])


def test_counts() -> None:
    """188 types, of which at least 162 are exact."""
    assert len(zoo.CONFIGS) == 188
    assert len(zoo.CONFIGS) - len(REFUSED) - len(PARTIAL) >= 162
    lacking = sorted(set(zoo.CONFIGS) - set(CONFIG_MAPPING))
    assert not lacking or Version(version("transformers")) < PINNED, f"skipped with a new transformers: {lacking}"


def judge(model: nn.Module, specs: list[AttentionSpec]) -> None:
    """Every attending module is mapped; rows move exactly what their role says; other rows move neither q nor k."""
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    names = {id(param): name for name, param in params.items()}
    attentions = zoo.Attentions(model)
    mapped = {modules[spec.module] for spec in specs}
    owners = {id(p): m for m in mapped for p in m.parameters()}
    for module in attentions.modules:  # tied copies of a mapped module share all of its mapped parameters
        assert module in mapped or any(id(p) in owners for p in module.parameters())
    for spec in one_of_each(specs):
        module = modules[spec.module]
        before = attentions.again(module)

        def moved(rows: zoo.Rows, module: nn.Module = module, before: zoo.Seen = before) -> str:
            with zoo.changed(params, rows):
                after = attentions.again(module)
            return "".join(role for role, a, b in zip("qkv", before, after, strict=True) if not torch.equal(a, b))

        for role in {b.role for p in spec.params for b in p.blocks}:
            assert moved(rows_with(spec, role)) == role, f"{spec.module}: {role}"
        for param in spec.params:  # no row too many: the first and the last of every block count
            for block in param.blocks:
                for row in {block.start, block.stop - 1}:
                    assert moved({param.name: (param.dim, [row])}) == block.role, f"{param.name}: row {row}"
        rest = others(spec, module, names)
        assert moved(rest) in ("", "v"), f"{spec.module}: rows outside of the map"


def judge_eager(model: nn.Module, specs: list[AttentionSpec]) -> None:
    """Mapped rows move the attention probabilities and, the probabilities held fixed, nothing else; others do not."""
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    names = {id(param): name for name, param in params.items()}
    calls = zoo.first_calls(model)
    for spec in one_of_each(specs):
        module = modules[spec.module]

        def run(
            rows: zoo.Rows, module: nn.Module = module, **options: bool
        ) -> tuple[list[torch.Tensor], torch.Tensor]:
            probabilities: list[torch.Tensor] = []
            args, kwargs = copy.deepcopy(calls[module])  # caches are written to
            with zoo.changed(params, rows), zoo.watched_softmax(probabilities, **options), torch.no_grad():
                out = module(*args, **kwargs)
            return probabilities, out[0] if isinstance(out, tuple | list) else out

        before, _ = run({})
        _, fixed = run({}, uniform=True)
        for role in ("q", "k"):
            rows = rows_with(spec, role)
            assert rows, f"{spec.module}: no {role}"
            assert not same(before, run(rows)[0])
            assert torch.equal(fixed, run(rows, uniform=True)[1])
            for param in spec.params:  # which is which: by name where they are apart, by hand where fused
                apart = param.kind == "weight" and {b.role for b in param.blocks} == {role}
                assert not apart or role in param.name.rpartition(spec.module)[2]
        for param in spec.params:
            for block in param.blocks:
                for row in {block.start, block.stop - 1}:
                    if param.kind == "bias" and block.role == "k":
                        continue  # adds the same to all scores of a query, which a softmax does not see
                    assert not same(before, run({param.name: (param.dim, [row])})[0]), f"{param.name}: row {row}"
        rest = others(spec, module, names)
        for name in [name for name in rest if name.endswith(SCORES.get(type(model).__name__, ("-",)))]:
            del rest[name]
        assert same(before, run(rest)[0])


def one_of_each(specs: list[AttentionSpec]) -> list[AttentionSpec]:
    """One layer for every distinct map."""
    return list(
        {(s.kind, tuple((p.name.count("."), p.shape, p.dim, p.blocks) for p in s.params)): s for s in specs}.values()
    )


def rows_with(spec: AttentionSpec, role: str) -> zoo.Rows:
    rows = {
        p.name: (p.dim, [i for b in p.blocks if b.role == role for i in range(b.start, b.stop)]) for p in spec.params
    }
    return {name: chosen for name, chosen in rows.items() if chosen[1]}


def others(spec: AttentionSpec, module: nn.Module, names: dict[int, str]) -> zoo.Rows:
    """All rows of the module that the map leaves out; parameters named in its notes choose, and are left alone."""
    mapped = {p.name: p for p in spec.params}
    rows: zoo.Rows = {}
    for param in module.parameters():
        name = names[id(param)]
        if name in mapped:
            taken = {i for b in mapped[name].blocks for i in range(b.start, b.stop)}
            rows[name] = (mapped[name].dim, [i for i in range(param.shape[mapped[name].dim]) if i not in taken])
        elif not any(name in note for note in spec.notes):
            rows[name] = (0, list(range(len(param))))
    return rows


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_fused(specs: list[AttentionSpec], order: list) -> None:
    for spec in specs:
        for param in spec.params:
            wanted = [(HEAD * i, HEAD * i + HEAD, *label) for i, label in enumerate(order) if label]
            assert [(b.start, b.stop, b.role, b.head) for b in param.blocks] == wanted
