"""PEFT's own model on the meta device: which parameters an adapter changes, and PEFT's own arithmetic for each.

The base model is never loaded. A copy of its class without weights gets the adapter injected by PEFT, so target
patterns, ranks, scalings and names are resolved by PEFT itself; merging hands one base tensor at a time to the layer
that PEFT made for it. "Bit-equal to merge_and_unload" therefore holds by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import layer as lora
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from qkguard.adapters.files import Adapter
from qkguard.arrays import as_array, as_tensor, has_nonfinite
from qkguard.errors import QKGuardError, first_line
from qkguard.layout.architecture import build_meta, find_architecture, plain_torch

NAME = "default"
# The classes that stand for DoRA in a layer's `lora_variant`; undocumented, read in PEFT 0.21. Nothing public
# tells DoRA from later variants, whose merge would pass here untested.
DORA = (variants.DoraLinearVariant, variants.DoraEmbeddingVariant)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MergeStep:
    """One change to one parameter: a LoRA layer merged, a trained copy put in its place, or token rows replaced."""

    kind: str  # "lora", "bias", "saved" or "tokens"
    module: nn.Module
    where: str
    """The module's name in the base model."""
    tensor: str = ""
    """For "saved": the parameter within the copy."""
    lock: Lock = field(default_factory=Lock, compare=False)
    """Held while the module is at work: all steps of one module have one."""

    @property
    def dora(self) -> bool:
        return self.kind == "lora" and NAME in getattr(self.module, "lora_variant", {})


@dataclass(frozen=True)
class AdaptedParam:
    """A parameter of the base model and what the adapter does to it, in PEFT's order.

    `name` is the name in the base model's `named_parameters()`; `untied` are the names that had shared its storage and
    now get values of their own, with the steps that make these (none: they keep the base's values).
    """

    name: str
    shape: tuple[int, ...]
    steps: tuple[MergeStep, ...]
    untied: tuple[tuple[str, tuple[MergeStep, ...]], ...] = ()


@dataclass
class _Shared:
    """One tensor of the base under all its names, the first of which names it, and what PEFT's modules do to it."""

    param: Tensor
    names: list[str]
    steps: list[MergeStep] = field(default_factory=list)
    """On the tensor itself."""
    copies: dict[str, MergeStep] = field(default_factory=dict)
    """Name -> the trained copy that takes its place under that name alone."""

    def adapted(self) -> AdaptedParam:
        """What becomes of it: names whose values part get tensors of their own."""
        name, shape = self.names[0], tuple(self.param.shape)
        values = {n: (self.copies[n],) if n in self.copies else tuple(self.steps) for n in self.names}
        if len(self.names) == 1 or not self.copies:
            return AdaptedParam(name, shape, values[name])
        return AdaptedParam(name, shape, values.pop(name), tuple(values.items()))


class MetaPeftModel:
    """An adapter bound to the class of its base model.

    Attributes:
        config: the base model's.
        model: PEFT's model: the base on the meta device, the adapter's own parameters on the CPU.
        adapted: every parameter of the base that changes.
        copies: by name, the base's own embeddings as the adapter's file holds them.

    Raises:
        QKGuardError: the adapter does not fit the base, or targets a kind of layer that is not supported.
    """

    def __init__(self, base: Path, adapter: Adapter, *, trust_remote_code: bool = False) -> None:
        architecture = find_architecture(base, trust_remote_code=trust_remote_code)
        with plain_torch(), quiet():
            bare: Any = build_meta(architecture)
            self.config = bare.config
            # By id, because PEFT wraps and renames the modules but keeps their parameters
            self._shared: dict[int, _Shared] = {}
            for name, param in bare.named_parameters(remove_duplicate=False):
                self._shared.setdefault(id(param), _Shared(param, [])).names.append(name)
            try:
                settings = PeftConfig.from_pretrained(str(adapter.folder))
                assert isinstance(settings, LoraConfig)
                settings.inference_mode, settings.init_lora_weights = True, True
                self.model: Any = get_peft_model(bare, settings, adapter_name=NAME, low_cpu_mem_usage=True)
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                raise QKGuardError(
                    f"PEFT cannot put the adapter {adapter.folder} on {base}: {first_line(error)}. Expected the "
                    "base model it was trained on."
                ) from error
            self._tied_tokens: list[str] = []
            self._find_steps()
            self.adapted = [one.adapted() for one in self._shared.values() if one.steps or one.copies]
            self._load(adapter, base)

    def _find_steps(self) -> None:
        """Note, for every tensor of the base, what PEFT's modules do to it."""
        inside: tuple[str, ...] = ()
        module: Any
        for key, module in self.model.base_model.model.named_modules():
            if any(key.startswith(f"{outer}.") for outer in inside):
                continue
            if isinstance(module, ModulesToSaveWrapper):
                inside += (key,)
                if any(isinstance(m, BaseTunerLayer) for m in module.modules()):
                    raise QKGuardError(f"{key} is in modules_to_save and carries an adapter: this is not supported.")
                for tensor, param in module.original_module.named_parameters():
                    step = MergeStep("saved", module.modules_to_save[NAME], key, tensor)
                    self._shared[id(param)].copies[f"{key}.{tensor}"] = step
            elif isinstance(module, TrainableTokensWrapper):
                inside += (key,)
                if module.token_adapter.tied_adapter:  # the tied layer has the same rows, and merges them
                    self._tied_tokens.append(key)
                    continue
                tokens = cast(Any, module.token_adapter)
                self._shared[id(tokens.get_base_layer().weight)].steps.append(MergeStep("tokens", tokens, key))
            elif isinstance(module, lora.LoraLayer):
                inside += (key,)
                _check_layer(key, module)
                module, base = cast(Any, module), cast(Any, module.get_base_layer())
                step = MergeStep("lora", module, key)
                self._shared[id(base.weight)].steps.append(step)
                if module.lora_bias.get(NAME):
                    if base.bias is None:
                        raise QKGuardError(f"{key} has lora_bias but no bias of its own, so it cannot be merged.")
                    self._shared[id(base.bias)].steps.append(replace(step, kind="bias"))
            elif isinstance(module, BaseTunerLayer):
                raise QKGuardError(f"{key}: PEFT layers of type {type(module).__name__} are not supported.")

    def _load(self, adapter: Adapter, base: Path) -> None:
        """Fill the adapter's parameters from its file."""
        state = {name: as_tensor(rows) for name, rows in adapter.arrays().items()}
        self._take_copies(state, base)
        double = any(t.dtype == torch.float64 for t in state.values())
        for step in (s for c in self.adapted for s in _all_steps(c)):
            _materialise(step, torch.float64 if double else torch.float32)
        try:
            with quiet():
                result: Any = set_peft_model_state_dict(self.model, state, adapter_name=NAME)
        except (KeyError, RuntimeError, ValueError) as error:
            raise QKGuardError(
                f"{adapter.folder} does not fit {base}: {first_line(error)}. Expected the base model it was "
                "trained on (and its vocabulary size)."
            ) from error
        missing = [
            key
            for key in result.missing_keys
            if NAME in key.split(".") and not any(f".{tied}." in key for tied in self._tied_tokens)
        ]
        if missing or result.unexpected_keys:
            what = (
                f"lacks {missing[0]}"
                if missing
                else f"has {result.unexpected_keys[0]}, which the base has no place for"
            )
            raise QKGuardError(f"{adapter.folder} {what}: expected the base model it was trained on.")

    def _take_copies(self, state: dict[str, Tensor], base: Path) -> None:
        """Take out the base's own embeddings, which PEFT saves beside an adapter on them and loads into the base."""
        by_name = {name: one for one in self._shared.values() for name in one.names}
        saved = {f"{s.where}.{s.tensor}" for c in self.adapted for s in _all_steps(c) if s.kind == "saved"}
        known = {param.name for param in self.adapted}
        self.copies: dict[str, Tensor] = {}
        for key in list(state):
            found = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if found not in by_name or found in saved:
                continue
            tensor, name, shape = state.pop(key), by_name[found].names[0], tuple(by_name[found].param.shape)
            if tuple(tensor.shape) != shape:
                raise QKGuardError(
                    f"The adapter holds {name} of shape {list(tensor.shape)}, {base} has {list(shape)}: the "
                    "vocabulary was resized. Resize the base model, save it, and merge onto that."
                )
            self.copies[name] = tensor
            if name not in known:
                self.adapted.append(AdaptedParam(name, shape, ()))

    def merged(
        self, param: AdaptedParam, weight: Tensor, steps: tuple[MergeStep, ...] | None = None, scale: float = 1.0
    ) -> Tensor:
        """The parameter after PEFT's merge, in `weight`'s dtype; `weight` (the base's tensor) is left alone.

        Several threads may ask for different parameters. `scale` multiplies the scaling of LoRA layers; it must be 1
        where a step is anything else.

        Raises:
            QKGuardError: NaN or Inf in the merged weight.
        """
        if param.name in self.copies:
            weight = self.copies[param.name].to(weight.dtype)
        for step in param.steps if steps is None else steps:
            with step.lock:
                weight = _run(step, weight, scale)
            if has_nonfinite(as_array(weight.contiguous())):
                raise QKGuardError(f"{param.name}: NaN or Inf in the merged weights: the adapter is damaged.")
        return weight


def _all_steps(param: AdaptedParam) -> tuple[MergeStep, ...]:
    return (*param.steps, *(step for _, steps in param.untied for step in steps))


def _check_layer(key: str, module: lora.LoraLayer) -> None:
    """Refuse layers and variants whose merge is not tested here; `lora_variant` (undocumented) names the variant."""
    variant = module.lora_variant.get(NAME)
    if type(module) not in (lora.Linear, lora.Embedding):
        raise QKGuardError(f"{key}: LoRA on {type(module).__name__} is not supported: expected Linear or Embedding.")
    if variant is not None and type(variant) not in DORA:
        raise QKGuardError(f"{key}: {type(variant).__name__} is not supported: expected LoRA, rsLoRA or DoRA.")


def _materialise(step: MergeStep, dtype: torch.dtype) -> None:
    """Room on the CPU for one layer's adapter parameters, which `low_cpu_mem_usage` leaves on the meta device.

    Through torch's private tables (`_parameters` and `_buffers`, torch 2): `Module.to_empty` keeps the dtype, which
    here has to become one that holds the adapter's file exactly.
    """
    parts = [step.module] if step.kind == "saved" else _adapter_parts(step.module)
    for part in parts:
        for owner in part.modules():
            tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for table in tables:
                for key, tensor in table.items():
                    if tensor is not None and tensor.is_meta and tensor.is_floating_point():
                        room = torch.empty(tensor.shape, dtype=dtype)
                        table[key] = nn.Parameter(room, False) if isinstance(tensor, nn.Parameter) else room


def _adapter_parts(module: nn.Module) -> list[nn.Module]:
    return [child for name, child in module.named_children() if name != "base_layer"]


@torch.no_grad()
def _run(step: MergeStep, weight: Tensor, scale: float) -> Tensor:
    module: Any = step.module
    if step.kind == "saved":
        return module.get_parameter(step.tensor).detach().to(weight.dtype)
    # as PEFT holds adapters on a base of this dtype: half precision is raised to float32
    _cast(_adapter_parts(module), torch.float32 if weight.dtype in _HALF else weight.dtype)
    if step.kind == "bias":
        return (weight + module.lora_B[NAME].bias * module.scaling[NAME] * scale).to(weight.dtype)
    # `merge` and `get_delta_weight` (PEFT 0.21) have no argument for a scaling or to leave a bias out, so PEFT's
    # undocumented tables change
    settings = [(table, dict(table)) for table in (getattr(module, n, {}) for n in ("scaling", "lora_bias"))]
    try:
        if step.kind == "lora":
            module.scaling[NAME] *= scale
            module.lora_bias[NAME] = False  # the bias is a step of its own
        if type(module) is lora.Linear and NAME not in module.lora_variant:
            # All that `merge` does for plain LoRA but for a copy and a slow look for NaN
            return weight + module.get_delta_weight(NAME).to(weight.dtype)
        return _merged_by_layer(step, weight)
    finally:
        for table, values in settings:
            table.update(values)


def _merged_by_layer(step: MergeStep, weight: Tensor) -> Tensor:
    """What PEFT's layer makes of `weight` in the place of its base layer's."""
    module: Any = step.module
    base, kept = module.get_base_layer(), module.get_base_layer().weight
    base.weight = nn.Parameter(weight, requires_grad=False)
    try:
        module.merge(safe_merge=True, adapter_names=[NAME])
        return base.weight.data
    except ValueError as error:
        raise QKGuardError(f"{step.where}: {error}") from None
    finally:
        base.weight = kept
        # PEFT would refuse to merge the adapter twice; the base weight that it merged into is gone
        module.merged_adapters.clear()


def _cast(parts: list[nn.Module], dtype: torch.dtype) -> None:
    for part in parts:
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT's remarks about meta tensors and tied layers say nothing about a merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
