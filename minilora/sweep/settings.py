"""What decides one run: its settings, validated before any work, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minilora.composed import DataConfig, change, flatten, setting_named, settings_in
from minilora.config import (
    ADAPTERS,
    AFFINE_TYPES,
    CODEBOOK_TYPES,
    LABEL,
    METHODS,
    PROGRESS,
    QUANTIZED,
    TINY,
    TRAINED,
    LoraConfig,
    QuantConfig,
    TrainConfig,
    require,
    require_in,
)

INSTALLED_MODELS = (TINY, "smollm2")
"""Models that are called by name; any other is a path."""
DEFAULT_RATES = {"full": 2e-3, "subset": 3e-3, "lora": 1e-2, "qlora": 1e-2, "qalora": 1e-2}
"""Learning rates of the tiny base."""
PRETRAINED_RATES = {"full": 1e-4, "subset": 2e-4, "lora": 2e-3, "qlora": 2e-3, "qalora": 2e-3}
"""Learning rates of a real model. They are lower, because it has more to forget."""
PRETRAINED: dict[str, Any] = {"steps": 80, "batch_size": 8, "n_train": 2000, "n_eval": 100}
"""Settings of a real model that the commands take where nothing is said."""
FIRST_FINGERPRINT = {
    *("method", "task", "split", "write_all", "text_path", "n_train", "n_eval", "subset_modules"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    *("bits", "quant_type", "block_size", "double_quant", "group_size"),
    *("learning_rate", "lora_plus_ratio", "seed", "steps", "batch_size", "warmup_steps"),
}
"""Settings that the first fingerprints hashed at every value. Never add to them: any other setting is hashed
only where it is not at its default, so that results made before it existed keep their fingerprints."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of one run.

    A run holds what was asked. What that comes to for its method is in `adapter()`, `storage()`, `training()`
    and, flat, in `row()`; `key()` is its fingerprint.

    Parameters
    ----------
    method
        base, quantized_base (controls, which do not train), full, subset, lora, qlora or qalora.
    model
        tiny, smollm2, a .gguf file or a Hugging Face folder.
    lora
        The adapter of methods lora, qlora and qalora.
    quant
        Storage of a quantized base and of deployed weights. Default: 4 bits of the method's own kind.
    train
        The training run. Its seed is the seed of everything that the run draws.
    data
        What the run trains on and is judged by.
    subset_modules
        Modules that method subset trains.
    write_all
        Judge three kinds of text (held-out examples, unseen values, deployed weights) rather than the first.
    preset
        Name of the preset that a run belongs to; not part of its fingerprint.
    stage
        Stage of the study that a run belongs to; not part of its fingerprint.

    Notes
    -----
    `quant.quantizer` finds the codes of a QA-LoRA or quantized base and, for QLoRA, those of the merged
    weights: QLoRA's own base is rounded to nearest, as bitsandbytes does.

    Examples
    --------
    >>> config = RunConfig(method="qlora", lora=LoraConfig(r=4), train=TrainConfig(steps=100, seed=1))
    >>> config.storage().quant_type, config.training().learning_rate, config.row()["r"]
    ('nf4', 0.01, 4)

    The flat names of a row and of the command line work too:

    >>> config == RunConfig.of(method="qlora", r=4, steps=100, seed=1)
    True
    >>> config.changed(method="qalora", bits=3).storage().quant_type
    'int3'
    >>> RunConfig.of(method="lora", bits=4)
    Traceback (most recent call last):
    minilora.config.ConfigError: bits=4: method 'lora' needs a full-precision base; qlora and qalora quantize
    """

    method: str = "lora"
    model: str = TINY
    lora: LoraConfig = LoraConfig()
    quant: QuantConfig | None = None
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    subset_modules: str = "layers.3"
    write_all: bool = True
    preset: str = field(default="custom", metadata={"role": LABEL})
    stage: str = field(default="study", metadata={"role": LABEL})

    def __post_init__(self) -> None:
        require_in(self.method, METHODS, "method")
        if self.model not in INSTALLED_MODELS and Path(self.model).exists():
            # a run can be opened from any folder
            object.__setattr__(self, "model", str(Path(self.model).resolve()))
        if self.quantized:
            require_in(self.storage().quant_type, quant_types(self.method), "quant_type")
        elif self.quant is not None:
            _refuse_quantization(self.method, {"quant_type": self.quant.quant_type})
        self._check_adapter()
        if self.method in TRAINED:
            self.training()
        real = self.model != TINY
        require(
            self.data.task != "python" or not real,
            "task",
            self.data.task,
            "is made of bytes, for the tiny base; with a real model take products, jsonl or text",
        )
        require(
            not self.data.packing or self.data.task == "jsonl" or (self.data.task == "products" and real),
            "packing",
            True,
            "is for jsonl, and for products with a real model; other batches have no padding",
        )

    def _check_adapter(self) -> None:
        lora = self.lora
        if self.method not in ADAPTERS:
            for name, plain in (("use_dora", LoraConfig.use_dora), ("init_lora_weights", "normal")):
                value = getattr(lora, name)
                require(value == plain, name, value, f"method {self.method!r} has no adapter")
            return
        require(
            not lora.use_qalora or self.method == "qalora",
            "use_qalora",
            True,
            "follows from the method; take method 'qalora'",
        )
        self.adapter()
        for init, method, why in (
            ("loftq", "qlora", "answers the rounding of a QLoRA base"),
            ("pissa", "lora", "takes its part out of a full-precision base"),
        ):
            good = lora.init_lora_weights != init or self.method == method
            require(good, "init_lora_weights", init, f"{why}; take method {method!r}")

    @classmethod
    def of(cls, **settings: Any) -> RunConfig:
        """Make a run from settings by their flat names; see `changed`.

        >>> RunConfig.of(method="qlora", bits=3, r=4).row()["quant_type"]
        'nf3'
        """
        return cls().changed(**settings)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> RunConfig:
        """Make the run of a row of results; columns that are no settings are left out."""
        known = settings_in(RunConfig).keys() | {"bits"}
        return cls.of(**{name: value for name, value in row.items() if name in known})

    def changed(self, **settings: Any) -> RunConfig:
        """Return the run with some settings changed.

        Parameters
        ----------
        **settings
            Flat name → value, such as `r=4`. None leaves a setting as it is. `bits` stands for the quant_type
            of the method's own kind: `bits=3` is nf3 for qlora and int3 for qalora.

        Raises
        ------
        ConfigError
            A setting that does not exist, or a value that does not go with the others.
        """
        given = {name.rpartition(".")[2]: value for name, value in settings.items() if value is not None}
        for name in settings.keys() - {"bits", "quant.bits"}:
            setting_named(RunConfig, name, settings[name])
        method, bits = given.get("method", self.method), given.pop("bits", None)
        require_in(method, METHODS, "method")
        if bits == 32:  # how rows say that nothing is quantized
            bits = None
        about_quant = {name for name, s in settings_in(RunConfig).items() if s.path.startswith("quant.")}
        if method not in QUANTIZED:
            _refuse_quantization(method, {"bits": bits} | given)
            kept = {name: value for name, value in given.items() if name not in about_quant}
            return change(replace(self, quant=None), kept)
        if "quant_type" in given:
            kind = str(given["quant_type"])
            require(
                bits is None or kind.endswith(str(bits)), "bits", bits, f"quant_type={kind!r} has {kind[-1]}"
            )
        elif bits is not None or about_quant & given.keys() or self.quant is not None:
            given["quant_type"] = self._quant_type(method, bits)
        if (
            self.quant is not None
            and self.quant.quantizer == "hqq"
            and given.get("quantizer") in ("rtn", "gptq")
        ):
            given = {"fit": "minmax"} | given  # hqq is a fit, too
        return change(self, given)

    def _quant_type(self, method: str, bits: int | None) -> str:
        """Return the type in which another method, or as many bits, would store this run's base."""
        family, quant = quant_family(method), self.quant
        if quant is None:
            return f"{family}{bits or 4}"
        if quant.quant_type not in quant_types(method):
            return f"{family}{bits or quant.bits}"
        if bits is None:
            return quant.quant_type
        return f"{'int' if quant.affine else 'nf'}{bits}"

    @property
    def quantized(self) -> bool:
        """Whether the frozen base is stored in few bits."""
        return self.method in QUANTIZED

    @property
    def seed(self) -> int:
        """Seed of everything that the run draws: `train.seed`."""
        return self.train.seed

    def adapter(self) -> LoraConfig:
        """Return the adapter; method qalora pools its input."""
        return replace(self.lora, use_qalora=self.method == "qalora")

    def storage(self) -> QuantConfig:
        """Return the storage of the deployed weights and of the base."""
        return self.quant or QuantConfig(f"{quant_family(self.method)}4")

    def base_storage(self) -> QuantConfig:
        """Return the storage of the base: as `storage()`, but always rounded to nearest for QLoRA."""
        return rounded_to_nearest(self.storage()) if self.method == "qlora" else self.storage()

    def training(self) -> TrainConfig:
        """Return what the trainer does: the method's learning rate, a warm-up no longer than the run."""
        rates = DEFAULT_RATES if self.model == TINY else PRETRAINED_RATES
        rate = rates.get(self.method) if self.train.learning_rate is None else self.train.learning_rate
        warmup_steps = min(self.train.warmup_steps, self.train.steps)
        return replace(self.train, learning_rate=rate, warmup_steps=warmup_steps)

    def row(self) -> dict[str, Any]:
        """Return every setting by its flat name, as a row of results holds it.

        A setting that the method does not use is None or at its default.
        """
        adapter, trained = self.method in ADAPTERS, self.method in TRAINED
        quant = self.storage() if self.quantized else None
        shown = replace(
            self,
            lora=self.lora if adapter else LoraConfig(),
            quant=quant,
            train=replace(self.train, learning_rate=self.training().learning_rate if trained else None),
            subset_modules=self.subset_modules if self.method == "subset" else RunConfig.subset_modules,
        )
        row = flatten(shown)
        for name, setting in settings_in(RunConfig).items():
            if setting.role == PROGRESS:
                del row[name]
            elif quant is not None and not reads(quant, setting.used_by):
                row[name] = None
            elif setting.used_by == "adapter" and not adapter:
                row[name] = setting.default
        if not adapter:
            row |= {"r": None, "lora_alpha": None, "target_modules": None}
        if quant is None:
            row["quantizer"] = "rtn"
        elif quant.quantizer == "hqq":
            row["fit"] = None  # a fit of its own
        return row | {"bits": 32 if quant is None else quant.bits}

    def key(self) -> str:
        """Return the fingerprint: 16 hex digits that change with all that may change the result."""
        known, hashed = settings_in(RunConfig), {}
        for name, value in self.row().items():
            later = name not in FIRST_FINGERPRINT
            if later and (value in (None, known[name].default) or known[name].role == LABEL):
                continue
            hashed[name] = value
        for name in ("text_path", "data"):
            if hashed.get(name) is not None:
                hashed[name] = str(Path(hashed[name]).resolve())
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def reads(quant: QuantConfig, used_by: str | None) -> bool:
    """Return whether a storage reads the fields that are for codebooks, integers or gptq.

    >>> reads(QuantConfig("nf4"), "codebook"), reads(QuantConfig("nf4"), "affine")
    (True, False)
    """
    kinds = {"codebook": not quant.affine, "affine": quant.affine, "gptq": quant.quantizer == "gptq"}
    return kinds.get(used_by or "", True)


def rounded_to_nearest(quant: QuantConfig) -> QuantConfig:
    """Return the same storage without GPTQ or HQQ.

    >>> rounded_to_nearest(QuantConfig("nf4", quantizer="gptq", damp_percent=0.1)) == QuantConfig("nf4")
    True
    """
    fit = "minmax" if quant.fit == "hqq" else quant.fit
    plain = replace(quant, desc_act=False, static_groups=False, damp_percent=QuantConfig.damp_percent)
    return replace(plain, quantizer="rtn", fit=fit)


def quant_types(method: str) -> tuple[str, ...]:
    """Return the types in which a method stores its base."""
    own = {"qlora": CODEBOOK_TYPES, "qalora": AFFINE_TYPES}
    return own.get(method, CODEBOOK_TYPES + AFFINE_TYPES)


def quant_family(method: str) -> str:
    """Return how a method's own types begin: int for QA-LoRA, else nf.

    >>> quant_family("qalora")
    'int'
    """
    return "int" if method == "qalora" else "nf"


def _refuse_quantization(method: str, given: Mapping[str, Any]) -> None:
    """Refuse what a method that quantizes nothing does not take."""
    needs = f"method {method!r} needs a full-precision base; qlora and qalora quantize"
    for name in ("bits", "quant_type"):
        require(given.get(name) is None, name, given.get(name), needs)
    quantizer = given.get("quantizer", "rtn")
    require(quantizer == "rtn", "quantizer", quantizer, f"method {method!r} quantizes nothing")
