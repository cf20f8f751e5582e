"""What decides one run: its settings, validated before any work, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minilora.config import (
    ADAPTERS,
    AFFINE_TYPES,
    CODEBOOK_TYPES,
    METHODS,
    QUANTIZED,
    TINY,
    LoraConfig,
    QuantConfig,
    TrainConfig,
    expand_modules,
    require,
    require_in,
)

NAMES = ("preset", "stage")  # fields that say where a run belongs, and do not change it
# fields that came after the first results: at their defaults they leave a run, and so its fingerprint, what
# it was
LATER = (
    "quantizer",
    "use_dora",
    "init_lora_weights",
    "model",
    "data",
    "max_length",
    "packing",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "logits_chunk",
    "optimizer",
)
SHORT_NAMES = (TINY, "smollm2")
DEFAULT_RATES = {"full": 2e-3, "subset": 3e-3, "lora": 1e-2, "qlora": 1e-2, "qalora": 1e-2}
PRETRAINED_RATES = {"full": 1e-4, "subset": 2e-4, "lora": 2e-3, "qlora": 2e-3, "qalora": 2e-3}
"""Learning rates of a model that has read a lot already: what is there must not be washed away. Adapters
share one."""
PRETRAINED: dict[str, Any] = {"steps": 80, "batch_size": 8, "n_train": 2000, "n_eval": 100}
"""What the commands take for such a model where nothing is said."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result. ``key()`` is its fingerprint.

    ``bits`` is 32 for an unquantized base. ``learning_rate=None`` takes the method's default.
    ``subset_modules`` names what ``method="subset"`` trains. ``write_all=False`` leaves out two of three
    texts that are judged, those for held-out values and those of the deployed weights, whose loss is still
    measured. ``model`` is ``tiny``, ``smollm2``, a GGUF file or a Hugging Face folder; ``data``, a JSONL
    file, makes the task ``jsonl``; ``max_length`` is the longest example in tokens of such a model, and
    ``packing`` puts several into one row of that length. ``gradient_accumulation_steps``,
    ``gradient_checkpointing``, ``logits_chunk`` and ``optimizer`` (less memory) are TrainConfig's.
    ``quantizer`` finds the codes of a QA-LoRA or quantized base and, for QLoRA, those of the merged weights
    (its base is rounded to nearest, as bitsandbytes does). ``use_dora`` and ``init_lora_weights`` are
    LoraConfig's.

    >>> RunConfig(method="lora", bits=4)
    Traceback (most recent call last): minilora.config.ConfigError: bits=4: method 'lora' stands on the
    full-precision base (bits=32); qlora and qalora quantize
    """

    method: str = "lora"
    task: str = "products"
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_plus_ratio: float = 1.0
    bits: int = 32
    quant_type: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    group_size: int | None = None
    target_modules: str | None = None
    subset_modules: str = "layers.3"
    learning_rate: float | None = None
    seed: int = 0
    steps: int = 200
    batch_size: int = 16
    warmup_steps: int = 10
    n_train: int = 4000
    n_eval: int = 256
    split: str = "test"
    write_all: bool = True
    text_path: str | None = None
    preset: str = "custom"
    stage: str = "study"
    quantizer: str = "rtn"
    use_dora: bool = False
    init_lora_weights: str = "normal"
    model: str = TINY
    data: str | None = None
    max_length: int = 512
    packing: bool = False
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    logits_chunk: int = 0
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        def default(field: str, value: Any) -> None:
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)

        require_in(self.method, METHODS, "method")
        if self.data is not None and self.task == RunConfig.task:
            object.__setattr__(self, "task", "jsonl")
        if self.model not in SHORT_NAMES and Path(self.model).exists():  # a run can be opened from anywhere
            object.__setattr__(self, "model", str(Path(self.model).resolve()))
        require_in(self.task, ("products", "python", "text", "jsonl"), "task")
        require_in(self.split, ("validation", "test"), "split")
        if self.method in ADAPTERS:
            default("r", 8)
            default("lora_alpha", 16.0)
            default("target_modules", "all-linear")
        if self.method in DEFAULT_RATES:
            default("learning_rate", (DEFAULT_RATES if self.model == TINY else PRETRAINED_RATES)[self.method])
        if self.quantized:
            default(
                "quant_type",
                f"{'int' if self.method == 'qalora' else 'nf'}{self.bits if self.bits != 32 else 4}",
            )
            allowed = {"qlora": CODEBOOK_TYPES, "qalora": AFFINE_TYPES}.get(
                self.method, CODEBOOK_TYPES + AFFINE_TYPES
            )
            require_in(self.quant_type, allowed, "quant_type")
            if self.bits == 32:
                object.__setattr__(self, "bits", int(self.quant_type[-1]))  # type: ignore[index]
            if self.quant_type in AFFINE_TYPES:
                default("group_size", 32)
            else:
                default("block_size", 64)
                default("double_quant", True)
            require(
                self.quant().bits == self.bits,
                "bits",
                self.bits,
                f"quant_type={self.quant_type!r} has {self.quant().bits}",
            )
        else:
            require(
                self.bits == 32,
                "bits",
                self.bits,
                f"method {self.method!r} stands on the full-precision base (bits=32); qlora and qalora quantize",
            )
            require(
                self.quantizer == "rtn",
                "quantizer",
                self.quantizer,
                f"method {self.method!r} quantizes nothing",
            )
        if self.method in ADAPTERS:
            self.lora()
            for init, method, why in (
                ("loftq", "qlora", "answers the rounding of a QLoRA base"),
                ("pissa", "lora", "takes its part out of a full-precision base"),
            ):
                require(
                    self.init_lora_weights != init or self.method == method,
                    "init_lora_weights",
                    init,
                    f"{why}; take method {method!r}",
                )
        else:
            for field in ("use_dora", "init_lora_weights"):
                value = getattr(self, field)
                require(
                    value == getattr(RunConfig, field), field, value, f"method {self.method!r} has no adapter"
                )
        if self.method in DEFAULT_RATES:
            self.train()
        require(
            isinstance(self.n_eval, int) and self.n_eval >= 1, "n_eval", self.n_eval, "must be at least 1"
        )
        for field, task in (("text_path", "text"), ("data", "jsonl")):
            require(
                (getattr(self, field) is not None) == (self.task == task),
                field,
                getattr(self, field),
                f"task {task!r} needs a file, and only that task takes one",
            )
        require(self.max_length >= 8, "max_length", self.max_length, "must be at least 8 tokens")
        require(
            self.task != "python" or self.model == TINY,
            "task",
            self.task,
            "is made of bytes, for the tiny base; with a real model take products, jsonl or text",
        )
        require(
            not self.packing or self.task == "jsonl" or (self.task == "products" and self.model != TINY),
            "packing",
            True,
            "is for jsonl, and for products with a real model; other batches have no padding, or are the tiny base's",
        )

    @property
    def quantized(self) -> bool:
        """Whether the frozen base is stored in few bits."""
        return self.method in QUANTIZED

    def quant(self) -> QuantConfig:
        """The storage of the weights that are deployed, and of the base."""
        double = True if self.double_quant is None else self.double_quant
        return QuantConfig(
            self.quant_type or "nf4", self.block_size or 64, double, self.group_size or 32, self.quantizer
        )

    def base_quant(self) -> QuantConfig:
        """How the base is quantized: as ``quant()``, but for QLoRA always to nearest."""
        return replace(self.quant(), quantizer="rtn") if self.method == "qlora" else self.quant()

    def lora(self) -> LoraConfig:
        """The adapter."""
        modules = expand_modules(self.target_modules or "all-linear")
        r, alpha = 8 if self.r is None else self.r, 16.0 if self.lora_alpha is None else self.lora_alpha
        return LoraConfig(
            r,
            alpha,
            self.lora_dropout,
            modules,
            self.use_rslora,
            use_qalora=self.method == "qalora",
            init_lora_weights=self.init_lora_weights,
            use_dora=self.use_dora,
        )

    def train(self) -> TrainConfig:
        """The training run."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            lora_plus_ratio=self.lora_plus_ratio,
            learning_rate=1e-3 if self.learning_rate is None else self.learning_rate,
            warmup_steps=min(self.warmup_steps, self.steps),
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            gradient_checkpointing=self.gradient_checkpointing,
            logits_chunk=self.logits_chunk,
            optimizer=self.optimizer,
        )

    def key(self) -> str:
        """16 hex digits that change with anything that may change the result, not with the preset's or
        stage's name."""
        text = {
            k: v
            for k, v in asdict(self).items()
            if k not in NAMES and (k not in LATER or v != getattr(RunConfig, k))
        }
        for field in ("text_path", "data"):
            if getattr(self, field) is not None:
                text[field] = str(Path(getattr(self, field)).resolve())
        return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:16]
