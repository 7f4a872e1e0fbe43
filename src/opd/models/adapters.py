"""Low-rank adapters (LoRA) through peft: the model stays as it is, small matrices beside its layers are trained.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A layer gives W x + scale B A x with scale =
alpha / rank; A is random and B zero at the start, so that the student begins as its base. The base may be stored in
the compute type, or quantised (Dettmers et al. 2023, "QLoRA"); A and B are float32 whatever it is.

The only file that imports peft, and only when an adapter is asked for.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd.config.schema import Lora
from opd.errors import ModelError
from opd.models.causal import CausalLM, digest
from opd.models.targets import Targets, find_targets, is_linear, short_names

NAME = "default"  # peft's own name for an adapter that is alone
LowRank = tuple[Tensor, Tensor]  # A [rank, in] and B [out, rank], the scale in B; float32


@dataclass(frozen=True)
class Adapter:
    """What was added to a module.

    peft     the PeftModel around the module.
    layers   name of the base's weight (`...q_proj`, `...experts.down_proj`) to the peft layer with its A and B.
    targets  which these are, and which linear layers have none.
    """

    peft: Any
    layers: dict[str, Any]
    targets: Targets
    rank: int

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone, for a while; nests, and is undone when something raises."""
        on = [layer for layer in self.layers.values() if not layer.disable_adapters]
        trained = [p for p in self.peft.parameters() if p.requires_grad]  # peft freezes A and B meanwhile
        try:
            for layer in on:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in on:
                layer.enable_adapters(True)
            for parameter in trained:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def added_to(self, name: str) -> Tensor | None:
        """scale B A, in the shape of the base's tensor of that name; None where there is no adapter."""
        layer = self.layers.get(name if name in self.targets.experts else name.removesuffix(".weight"))
        return None if layer is None else layer.get_delta_weight(NAME)

    def linear_parts(self, layer: Any) -> tuple[Any, LowRank | None]:
        """The base's layer, and A and B where `layer` has them."""
        if not hasattr(layer, "lora_A"):
            return layer, None
        a_RI, b_OR = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
        return layer.base_layer, (a_RI, b_OR * layer.scaling[NAME])


class AdapterOff(CausalLM):
    """A student's base as a model of its own: the same parameters, read with the adapter off.

    `module` is the student's, behind a thin wrapper that turns the adapter off for every call.
    """

    def __init__(self, student: CausalLM) -> None:
        assert student.adapter is not None, f"{student.name} has no adapter to turn off"
        self._student_adapter = student.adapter
        self._module = student.module
        super().__init__(
            Within(student.module, student.adapter.off),  # pyright: ignore[reportArgumentType]
            vocab_size=student.vocab_size,
            compute_dtype=student.compute_dtype,
            name=f"{student.name} (adapter off)",
        )

    def hidden(
        self, ids_NS: Tensor, attention_NS: Tensor | None, positions_NS: Tensor | None, cache: Any = None
    ) -> Tensor:
        with self._student_adapter.off():
            return super().hidden(ids_NS, attention_NS, positions_NS, cache)

    @property
    def architecture(self) -> type:
        return type(self._module)

    @property
    def parameter_count(self) -> int:
        return super().parameter_count - sum(p.numel() for p in _matrices(self._student_adapter))

    @property
    def trainable_count(self) -> int:
        return 0

    def linear_parts(self, layer: Any) -> tuple[Any, LowRank | None]:
        return self._student_adapter.linear_parts(layer)[0], None

    def fingerprint(self) -> str:
        return digest(base_tensors(self._module))


class Within:
    """A module whose calls run inside a context of their own; everything else is the module's."""

    def __init__(self, module: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._module, self._context = module, context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._context():
            return self._module(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._context():
            return self._module.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def plan_adapter(module: Any, spec: Lora, *, role: str = "student") -> Targets:
    """Which layers of a module would get an adapter; it may lie on the meta device. Raises ModelError."""
    return find_targets(module, spec.targets, unreachable=_unreachable(module, role), role=role)


def add_adapter(model: CausalLM, spec: Lora, *, base: str, revision: str | None = None, role: str = "student") -> None:
    """Freezes the model and puts an adapter beside its layers, in place. Draws A from torch's global generator.

    base, revision  what an exported adapter names as the model it belongs to.

    Raises ModelError when peft is missing or a target names nothing.
    """
    peft, module = _peft(role), model.module
    targets = plan_adapter(module, spec, role=role)
    kinds = {type(module.get_submodule(name)).__name__ for name in targets.layers}
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=short_names(module, list(targets.layers)),
        target_parameters=sorted({".".join(name.split(".")[-2:]) for name in targets.experts}) or None,
        fan_in_fan_out=kinds == {"Conv1D"},
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers by a name of old
        wrapped = peft.get_peft_model(module, config, revision=revision)
    config.base_model_name_or_path = base
    layers = dict(_layers(module))
    assert layers.keys() == {*targets.layers, *targets.experts}, "peft chose other layers than opd"
    model.adapter = Adapter(peft=wrapped, layers=layers, targets=targets, rank=spec.rank)


def adapter_off_view(student: CausalLM) -> CausalLM:
    """The base of a student with an adapter: no memory of its own, bit for bit what a freshly loaded base says."""
    return AdapterOff(student)


def base_tensors(module: Any) -> dict[str, Tensor]:
    """The state of a module without its adapter, named as before it had one."""
    state = module.state_dict()
    return {key.replace(".base_layer", ""): value for key, value in state.items() if ".lora_" not in key}


def base_fingerprint(model: CausalLM) -> str:
    """Hash of everything outside the adapter: a run that is resumed must find the same frozen base."""
    return digest(base_tensors(model.module))


def untrained_targets(model: CausalLM) -> list[str]:
    """After a backward pass: adapter layers that it did not reach. At the start B is zero, so that A has no gradient;
    B has one wherever a token went through the layer."""
    if model.adapter is None:
        return []
    return [name for name, layer in model.adapter.layers.items() if not _reached(layer.lora_B[NAME].weight.grad)]


def idle_experts(model: CausalLM) -> dict[str, list[int]]:
    """After a backward pass: by adapter layer, experts without a gradient, because no token was sent to them."""
    if model.adapter is None:
        return {}
    found: dict[str, list[int]] = {}
    for name, (count, *_) in model.adapter.targets.experts.items():
        gradient_OX = model.adapter.layers[name].lora_B[NAME].weight.grad
        if gradient_OX is None:
            continue
        reached_E = gradient_OX.unflatten(1, (-1, count)).ne(0).flatten(0, 1).any(0)  # columns: rank x experts
        if not reached_E.all():
            found[name] = (~reached_E).nonzero()[:, 0].tolist()
    return found


def adapter_notes(model: CausalLM) -> list[str]:
    """Sentences about the adapter, for the lines that a run begins with."""
    adapter = model.adapter
    if adapter is None:
        return []
    frozen = model.parameter_count - model.trainable_count
    lines = [
        f"LoRA of rank {adapter.rank} beside {len(adapter.layers)} layers: {model.trainable_count:,} float32 "
        f"parameters are trained, {frozen:,} stay as they are"
    ]
    if adapter.targets.without:
        kinds = sorted({".".join(name.split(".")[-2:]) for name in adapter.targets.without})
        lines.append(f"without an adapter, because peft cannot reach them: {', '.join(kinds)}")
    return lines


def merge_folder(module: Any, folder: Path, role: str) -> Any:
    """A base with the peft adapter of a folder merged into it, all of it to be trained. Raises what peft raises."""
    peft = _peft(role)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted = peft.PeftModel.from_pretrained(module, str(folder))
    return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)


def require_peft(role: str) -> None:
    """Raises ModelError when peft is not installed."""
    _peft(role)


def _peft(role: str) -> Any:
    # peft imports bitsandbytes, which says on import and at every size of input what it would rather have.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as e:
        raise ModelError(f"{role}: adapters (LoRA) need peft: pip install 'opd[lora]'") from e
    return peft


def _unreachable(module: Any, role: str) -> list[str]:
    """Linear layers that peft would take for experts of an older transformers: in some mixtures of experts, what ends
    in gate_proj, up_proj or down_proj (a shared expert's, a dense layer's)."""
    peft = _peft(role)
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = [name for name, layer in module.named_modules() if is_linear(layer)]
    probe = peft.LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(probe, model=module, conversions=None)
    return [name for name in names if name not in probe.target_modules]


def _layers(module: Any) -> Iterator[tuple[str, Any]]:
    """Every adapter layer by the name of the weight in the base; experts' layers stand inside each other."""
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            parameter = getattr(layer, "parameter_name", None)
            plain = name.replace(".base_layer", "")
            yield (plain if parameter is None else f"{plain}.{parameter}"), layer


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


def _matrices(adapter: Adapter) -> Iterator[Tensor]:
    for layer in adapter.layers.values():
        yield from _weights(layer)


def _reached(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.ne(0).any())
