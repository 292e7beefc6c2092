"""`find_attention`: from a model's behaviour to row maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout import build, capture, geometry
from qkguard.layout.replay import Replay, Touched, replay
from qkguard.layout.spec import AttentionSpec, Block, ParamMap


def find_attention(model_or_config: Any, *, spec: Any = None, trust_remote_code: bool = False) -> list[AttentionSpec]:
    """Every softmax-attention layer of a model with the rows that make its queries and keys.

    Works on the class and the config alone: a live model is neither forwarded nor changed, and may be sharded
    (ZeRO-3, DTensor) or wrapped (DDP, torch.compile, PEFT); names are those of its `named_parameters()`.

    Args:
        model_or_config: a transformers model, a config, a folder, a hub id or the path of a config.json.
        spec: a list of AttentionSpec, used as it is.
        trust_remote_code: allow a config's own code to be imported.

    Raises:
        UnknownLayoutError: where the layout cannot be established for certain.
    """
    if isinstance(spec, list):
        return spec
    source = build.resolve(model_or_config, trust_remote_code=trust_remote_code)
    with build.undisturbed():
        specs = _discover(source)
    return specs if source.live is None else _named_as_live(specs, source.live)


def _discover(source: build.Source) -> list[AttentionSpec]:
    model = build.build_meta(source)
    build.attend_with(model, capture.ATTENTION_NAME)
    captures = capture.run(model)
    if not captures:
        raise UnknownLayoutError(
            f"{source.model_class.__name__}: no softmax attention was seen in a forward pass; pass the layout by hand: "
            "spec=FILE.yaml"
        )
    names = {id(param): name for name, param in model.named_parameters()}
    replays: dict[Any, Replay] = {}
    specs, owned = [], set()
    for found in captures:
        key = _signature(found)
        if key not in replays:
            replays[key] = replay(found)
        shown = replays[key]
        local = {name: names[id(param)] for name, param in found.call.module.named_parameters()}
        params = tuple(
            sorted(
                (
                    param
                    for name, touched in shown.touched.items()
                    if (param := _param_map(local[name], name, shown.shapes[name], touched, found.call.module))
                ),
                key=lambda p: p.name,
            )
        )
        if not {p.name for p in params} - owned:
            continue
        owned |= {p.name for p in params}
        specs.append(
            AttentionSpec(
                layer=geometry.layer_index(found.call, model),
                module=found.call.path[-1],
                kind=geometry.layer_kind(source.config, geometry.layer_index(found.call, model), found.options),
                num_heads=shown.num_heads,
                num_kv_heads=shown.num_kv_heads,
                head_dim=shown.head_dim,
                params=params,
                rotary=shown.rotary,
                rotary_dim=shown.rotary_dim,
            )
        )
    geometry.check_layer_types(source.config, specs)
    return specs


def _signature(found: capture.Capture) -> Any:
    """What two calls must share to share a replay: class, plain attributes but the index, parameters, argument shapes."""
    module = found.call.module
    plain = tuple(
        (key, value)
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
    )
    shapes = tuple((name, tuple(param.shape)) for name, param in module.named_parameters())
    return type(module), plain, shapes, tuple(found.query.shape), tuple(found.key.shape), tuple(found.value.shape)


def _param_map(
    name: str, local: str, shape: tuple[int, ...], touched: tuple[Touched, ...], module: nn.Module
) -> ParamMap | None:
    dim = geometry.output_dim(module, local, touched)
    blocks = _blocks(touched[dim])
    if not blocks:
        return None
    return ParamMap(name, shape, dim, geometry.kind_of(module, local), blocks)


def _blocks(rows: Touched) -> tuple[Block, ...]:
    """Neighbouring rows that feed the same things, as blocks; rows that feed neither q nor k are left out."""
    labels = [
        _label(*row)
        for row in zip(*(_ints(t) for t in (rows.q, rows.k, rows.v, rows.q_head, rows.k_head)), strict=True)
    ]
    blocks, start = [], 0
    for stop in range(1, len(labels) + 1):
        if stop == len(labels) or labels[stop] != labels[start]:
            role, head = labels[start]
            if role.strip("v"):
                blocks.append(Block(start, stop, role, head))
            start = stop
    return tuple(blocks)


def _ints(tensor: Tensor) -> list[int]:
    return tensor.int().tolist()


def _label(q: int, k: int, v: int, q_head: int, k_head: int) -> tuple[str, int | None]:
    role = "q" * q + "k" * k + "v" * v
    head = {"q": q_head, "k": k_head}.get(role, -1)
    return role, None if head < 0 else head


def _named_as_live(specs: list[AttentionSpec], live: nn.Module) -> list[AttentionSpec]:
    """The same specs under the live model's parameter names, which must all exist with the expected shapes."""
    from dataclasses import replace

    names = build.live_names(live)
    params = dict(live.named_parameters())
    out = []
    for spec in specs:
        maps = []
        for param in spec.params:
            if param.name not in names:
                raise UnknownLayoutError(
                    f"{param.name} is in a fresh copy of the model's class but not in the model itself; its structure was "
                    "changed after it was built: pass the layout by hand: spec=FILE.yaml"
                )
            shape = build.full_shape(params[names[param.name]])
            if shape != param.shape:
                raise UnknownLayoutError(
                    f"{param.name}: a fresh copy of the class has shape {param.shape}, the model {shape}; "
                    "its config does not describe it"
                )
            maps.append(replace(param, name=names[param.name]))
        out.append(replace(spec, params=tuple(maps)))
    return out
