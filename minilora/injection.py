"""Choose what trains: adapters (`inject`, `inject_lora`), all weights (`full`) or some (`subset`).

Each function returns a new model that shares the frozen arrays of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from minilora.adapter import Adapter, AnyLinear
from minilora.config import LINEAR_MODULES, SVD_INITS, ConfigError, LoraConfig, QuantConfig, matches, require
from minilora.layers import Linear
from minilora.parameters import DenseWeight, Parameter
from minilora.quant.model import quantize_model
from minilora.threads import single_blas
from minilora.variants import adapt, warn_if_it_cannot_train

if TYPE_CHECKING:
    from minilora.transformer import Transformer


@single_blas()
def inject(
    model: Transformer, make: Callable[[Linear], Adapter], target_modules: tuple[str, ...] = LINEAR_MODULES
) -> Transformer:
    """Return a new model in which `make(linear)` replaces each targeted linear.

    Parameters
    ----------
    model : Transformer
        The base; its arrays are shared and become read-only.
    make : callable
        Returns an `Adapter` around the frozen Linear that it is given.
    target_modules : tuple of str
        Modules' own names (`q_proj`) or ends of full names (`layers.3.self_attn.q_proj`).

    Raises
    ------
    ConfigError
        If nothing matches, if the model has adapters already, or if `make` returns no `Adapter`.

    Examples
    --------
    >>> from minilora import LoraConfig, LoraLinear, init_model, ModelConfig
    >>> rng = np.random.default_rng(0)
    >>> base = init_model(ModelConfig(), rng)
    >>> model = inject(base, lambda linear: LoraLinear(linear, LoraConfig(r=2), rng))
    >>> len(model.trainable())  # A and B of 7 projections in each of 4 blocks
    56
    """
    names = _names_without_adapter(model)
    _check_targets("target_modules", target_modules, names)
    return _wrap(model.map_parameters(Parameter.freeze), make, _chosen(names, target_modules))


@single_blas()
def inject_lora(
    model: Transformer, config: LoraConfig, rng: np.random.Generator, quant: QuantConfig | None = None
) -> Transformer:
    """Return a new model with LoRA, DoRA or QA-LoRA adapters on `config.target_modules`.

    To put several adapters over one base, inject once for each; every call returns its own model.

    Parameters
    ----------
    model : Transformer
        The base; its arrays are shared and become read-only.
    config : LoraConfig
        Rank, scaling, targets and start of the adapters.
    rng : numpy.random.Generator
        Draws the first A.
    quant : QuantConfig, optional
        Quantize the projections of a dense base in the same step. LoftQ needs it, PiSSA may have it.

    Raises
    ------
    ConfigError
        If nothing matches, if the model has adapters already, or if QA-LoRA finds a base without offsets.
    """
    names = _names_without_adapter(model)
    for field in ("target_modules", "rank_pattern", "alpha_pattern"):
        _check_targets(field, tuple(getattr(config, field)), names)
    if quant is not None and any(not isinstance(linear.weight, DenseWeight) for _, linear in model.linears()):
        raise ConfigError(
            "quant: the base is quantized already, and would be rounded twice; leave it out, or give a "
            "dense model"
        )
    frozen = model.map_parameters(Parameter.freeze)
    chosen = _chosen(names, config.target_modules)
    if quant is not None:  # PiSSA and LoftQ start from the dense weight, and quantize it themselves
        only = set(names) - chosen if config.init_lora_weights in SVD_INITS else None
        frozen = quantize_model(frozen, quant, only=only)

    def make(linear: Linear) -> Adapter:
        pool = _offset_group(linear, frozen) if config.use_qalora else 1
        return adapt(linear, config, rng, pool, None if linear is frozen.head else quant)

    return _wrap(frozen, make, chosen)


def full(model: Transformer) -> Transformer:
    """Return a new model for full fine-tuning: every parameter is a trainable copy."""
    _refuse_quantized(model, "full")
    return model.map_parameters(Parameter.thaw)


def subset(model: Transformer, modules: tuple[str, ...]) -> Transformer:
    """Return a new model in which only some modules are trainable copies.

    A parameter trains if one of `modules` matches whole parts of its name. `("layers.3",)` is block 3.
    `("q_proj", "v_proj")` are two projections of every block. ConfigError if a name matches nothing.
    """
    _refuse_quantized(model, "subset")
    names = [p.name.removesuffix(".weight") for p in model.parameters()]
    for module in modules:
        if not any(f".{module}." in f".{name}." for name in names):
            raise ConfigError(f"modules={module!r}: matches nothing; there are {', '.join(names)}")
    require(len(modules) > 0, "modules", modules, "name at least one module")

    def choose(p: Parameter) -> Parameter:
        name = p.name.removesuffix(".weight")
        return p.thaw() if any(f".{module}." in f".{name}." for module in modules) else p.freeze()

    return model.map_parameters(choose)


def _wrap(frozen: Transformer, make: Callable[[Linear], Adapter], chosen: set[str]) -> Transformer:
    def change(linear: AnyLinear) -> AnyLinear:
        if linear.name not in chosen:
            return linear
        made = make(linear.base)
        if not isinstance(made, Adapter):
            raise ConfigError(
                f"make: returned a {type(made).__name__} for {linear.name}; it must return an Adapter, a "
                "subclass of minilora.Adapter with forward, backward, trained and delta"
            )
        warn_if_it_cannot_train(made)
        return made

    return frozen.map_linears(change)


def _names_without_adapter(model: Transformer) -> list[str]:
    for name, linear in model.linears():
        if isinstance(linear, Adapter):
            raise ConfigError(
                f"model: already injected ({name} has an adapter); inject into the base, once for each "
                "adapter"
            )
    return [name for name, _ in model.linears()]


def _chosen(names: list[str], targets: tuple[str, ...]) -> set[str]:
    return {name for name in names if any(matches(name, target) for target in targets)}


def _offset_group(linear: Linear, frozen: Transformer) -> int:
    """Return the number of inputs that share one float offset, into which QA-LoRA merges."""
    weight = linear.weight
    if not weight.offset_group:
        if weight is frozen.embedding.weight:
            why = "a tied head shares the embedding's table"
        else:
            why = f"{linear.name} is stored as {getattr(weight, 'quant_type', type(weight).__name__)}"
        raise ConfigError(
            f"use_qalora=True: needs a base weight with a float offset for each group, but {why}; quantize "
            "the base to int2, int3, int4 or int8 (Q4_1 will do as it is), or leave it out of target_modules"
        )
    return weight.offset_group


def _check_targets(field: str, targets: tuple[str, ...], names: list[str]) -> None:
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for target in targets:
        if targets == LINEAR_MODULES and target == "gate_proj":
            continue  # "all-linear" takes the linears that exist, and the two-matrix MLP has no gate
        if not any(matches(name, target) for name in names):
            raise ConfigError(
                f"{field}={target!r}: matches no module; there are {', '.join(kinds)} "
                f"(or full names such as {names[0]})"
            )


def _refuse_quantized(model: Transformer, method: str) -> None:
    for name, linear in model.linears():
        if isinstance(linear, Adapter) or not isinstance(linear.weight, DenseWeight):
            raise ConfigError(
                f"method={method!r}: {name} is {'adapted' if isinstance(linear, Adapter) else 'quantized'}; "
                "gradients of W need a dense base model"
            )
