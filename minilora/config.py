"""Configuration: small frozen dataclasses, validated once, with the field's names (PEFT's, bitsandbytes',
Llama's).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
LINEAR_MODULES = ATTENTION_MODULES + MLP_MODULES

TINY = "tiny"
"""The name of the base that ships in the package; any other is a real model, with a tokenizer
(``minilora.formats.bases``)."""

TRAINED = ("full", "subset", "lora", "qlora", "qalora")
CONTROLS = ("base", "quantized_base")
METHODS = CONTROLS + TRAINED
ADAPTERS = ("lora", "qlora", "qalora")
QUANTIZED = ("qlora", "qalora", "quantized_base")
"""Methods: those that train, those that only measure; those with an adapter, those over a base in few
bits."""

CODEBOOK_TYPES = ("nf2", "nf3", "nf4", "nf8", "fp4")
AFFINE_TYPES = ("int2", "int3", "int4", "int8")
QUANTIZERS = ("rtn", "gptq", "hqq")
FITS = ("minmax", "symmetric", "mse", "hqq")
OFFSET_STORES = ("float16", "float32", "zero")

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd")
DTYPES = ("float32", "float64", "float16")

SVD_INITS = ("pissa", "loftq")
INITS = ("normal", "kaiming", "gaussian", *SVD_INITS)


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field, the value, what is allowed and the fix."""


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """Raise ``ConfigError("field=value: allowed")`` unless ``ok``.

    >>> require(False, "r", 0, "must be at least 1")
    Traceback (most recent call last):
    minilora.config.ConfigError: r=0: must be at least 1
    """
    if not ok:
        raise ConfigError(f"{field}={value!r}: {allowed}")


def require_in(value: Any, allowed: Collection[Any], field: str) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    require(value in allowed, field, value, "choose one of " + ", ".join(map(str, allowed)))


def _whole(value: Any, field: str, least: int = 1) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, field, value, f"must be a whole number, at least {least}")


def _number(
    value: Any, field: str, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    ok = (
        isinstance(value, (int, float)) and abs(value) <= sys.float_info.max and low <= value <= high
    )  # NaN fails, 10**400 too
    ok = ok and not (open_low and value == low)
    require(
        ok, field, value, f"must be a finite number {'above' if open_low else 'from'} {low:g} to {high:g}"
    )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family transformer; the names are those of transformers' ``LlamaConfig``.

    The defaults are the base that ships in the package. ``hidden_act="silu"`` is the SwiGLU MLP (gate, up,
    down); ``"gelu_pytorch_tanh"`` the two-matrix MLP (up, down) of the LoRA paper's figure. ``rope_factors``
    (head_dim / 2) divide the speeds of the rotary pairs: all equal is linear scaling, Llama 3's slows the
    slow pairs only; None leaves them.

    >>> ModelConfig(num_attention_heads=3)
    Traceback (most recent call last):
    minilora.config.ConfigError: num_attention_heads=3: must divide hidden_size=128
    """

    vocab_size: int = 259
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    context_length: int = 256
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    rope_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "context_length",
        ):
            _whole(getattr(self, field), field)
        for field in ("num_attention_heads", "num_key_value_heads"):
            _whole(getattr(self, field), field)
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        require(
            self.hidden_size % heads == 0,
            "num_attention_heads",
            heads,
            f"must divide hidden_size={self.hidden_size}",
        )
        require(heads % kv == 0, "num_key_value_heads", kv, f"must divide num_attention_heads={heads}")
        require(
            self.head_dim % 2 == 0,
            "hidden_size",
            self.hidden_size,
            f"hidden_size / num_attention_heads = {self.head_dim} must be even: rotary positions turn pairs",
        )
        require_in(self.hidden_act, ("silu", "gelu_pytorch_tanh"), "hidden_act")
        _number(self.rope_theta, "rope_theta", 0, open_low=True)
        _number(self.rms_norm_eps, "rms_norm_eps", 0)
        if self.rope_factors is not None:
            object.__setattr__(self, "rope_factors", tuple(self.rope_factors))  # JSON makes lists of tuples
            require(
                len(self.rope_factors) == self.head_dim // 2,
                "rope_factors",
                f"{len(self.rope_factors)} numbers",
                f"one for each rotary pair, head_dim / 2 = {self.head_dim // 2}",
            )
            for i, factor in enumerate(self.rope_factors):
                _number(factor, f"rope_factors[{i}]", 0, open_low=True)

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how; PEFT's names and meaning.

    ``scaling`` is lora_alpha / r, or lora_alpha / √r with ``use_rslora`` (arXiv 2312.03732). A starts
    Gaussian with standard deviation 1/√(3·in) (``"normal"``; the same variance as PEFT's ``"kaiming"``, and
    independent of r) or, as PEFT's own ``"gaussian"``, with 1/r, which confounds a rank sweep. B starts at
    zero. ``"pissa"`` and ``"loftq"`` (``loftq_iter`` rounds) start both from a decomposition:
    ``minilora.initial``. ``use_qalora`` pools the input over the base weight's groups (arXiv 2309.14717); the
    group size is the weight's own. ``use_dora`` trains the length of each row of W + ΔW apart (arXiv
    2402.09353). ``rank_pattern`` and ``alpha_pattern`` give single modules, by name or end of name, another r
    or lora_alpha.

    >>> LoraConfig(r=8, lora_alpha=16).scaling
    2.0
    >>> LoraConfig(r=8, rank_pattern={"layers.3.mlp.up_proj": 2}).of("model.layers.3.mlp.up_proj").r
    2
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = LINEAR_MODULES
    use_rslora: bool = False
    use_qalora: bool = False
    init_lora_weights: str = "normal"
    use_dora: bool = False
    loftq_iter: int = 1
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _whole(self.r, "r")
        _number(self.lora_alpha, "lora_alpha", 0, open_low=True)
        _number(self.lora_dropout, "lora_dropout", 0, 1)
        require(
            self.lora_dropout < 1,
            "lora_dropout",
            self.lora_dropout,
            "must be below 1: at 1 nothing is left to train on",
        )
        if isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", expand_modules(self.target_modules))
        require(
            len(self.target_modules) > 0, "target_modules", self.target_modules, "name at least one module"
        )
        require_in(self.init_lora_weights, INITS, "init_lora_weights")
        _whole(self.loftq_iter, "loftq_iter")
        for pattern in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, pattern)
            require(isinstance(value, Mapping), pattern, value, "must map module names to numbers")
        for name, r in self.rank_pattern.items():
            _whole(r, f"rank_pattern[{name!r}]")
        for name, alpha in self.alpha_pattern.items():
            _number(alpha, f"alpha_pattern[{name!r}]", 0, open_low=True)
        if self.use_qalora:
            why = "needs an offset that takes up ΔW, and {} changes more than that; choose either, or leave out use_qalora"
            require(not self.use_dora, "use_dora", True, "use_qalora " + why.format("the length of rows"))
            require(
                self.init_lora_weights not in SVD_INITS,
                "init_lora_weights",
                self.init_lora_weights,
                "starts from a decomposition over all inputs, and use_qalora sees sums of groups; use normal",
            )

    @property
    def scaling(self) -> float:
        """The factor in front of B A: α/r, or α/√r for rsLoRA. It is computed here and nowhere else."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def of(self, module: str) -> LoraConfig:
        """The configuration of one module, its full name given: patterns resolved, of which the first that
        matches counts.
        """
        r = next((v for k, v in self.rank_pattern.items() if matches(module, k)), self.r)
        alpha = next((v for k, v in self.alpha_pattern.items() if matches(module, k)), self.lora_alpha)
        return replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})


def matches(name: str, target: str) -> bool:
    """PEFT's rule: the target is the module's last part or a suffix of whole parts, never a substring.

    >>> matches("model.layers.0.self_attn.q_proj", "q_proj"), matches("model.layers.0.self_attn.q_proj", "proj")
    (True, False)
    """
    return name == target or name.endswith("." + target)


def expand_modules(text: str) -> tuple[str, ...]:
    """Turn ``"all-linear"``, ``"attention"``, ``"mlp"`` or a comma list into module names.

    >>> expand_modules("q_proj,v_proj")
    ('q_proj', 'v_proj')
    """
    short = {"all-linear": LINEAR_MODULES, "attention": ATTENTION_MODULES, "mlp": MLP_MODULES}
    return short.get(text) or tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class QuantConfig:
    """How a frozen weight is stored, and how its codes are found.

    Codebooks (``nf2 nf3 nf4 nf8 fp4``) take ``block_size`` and ``double_quant``; affine integers (``int2 int3
    int4 int8``, w = scale·q + offset) take ``group_size``, counted along the input, ``fit`` (how scale and
    offset are found) and ``offset_dtype`` (how the offset is stored; ``zero`` is GPTQ's whole zero point).

    ``quantizer``: ``rtn`` rounds each weight to the nearest code · ``gptq`` (arXiv 2210.17323) rounds column
    by column, spreads each error over the columns still to come and needs calibration data; ``desc_act``,
    ``static_groups`` and ``damp_percent`` are its options, by transformers' names · ``hqq`` fits the offsets
    without data.

    >>> QuantConfig("int4").bits, QuantConfig("int4").affine
    (4, True)
    >>> QuantConfig("nf4", quantizer="hqq")
    Traceback (most recent call last): minilora.config.ConfigError: quantizer='hqq': fits offsets, and nf4 has
    none; take rtn or gptq, or an integer type
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    group_size: int = 32
    quantizer: str = "rtn"
    fit: str = "minmax"
    offset_dtype: str = "float16"
    desc_act: bool = False
    static_groups: bool = False
    damp_percent: float = 0.01

    def __post_init__(self) -> None:
        require_in(self.quant_type, CODEBOOK_TYPES + AFFINE_TYPES, "quant_type")
        require_in(self.block_size, (32, 64, 128, 256, 512, 1024, 2048, 4096), "block_size")
        _whole(self.group_size, "group_size")
        require_in(self.quantizer, QUANTIZERS, "quantizer")
        require_in(self.fit, FITS, "fit")
        require_in(self.offset_dtype, OFFSET_STORES, "offset_dtype")
        _number(self.damp_percent, "damp_percent", 0, 1, open_low=True)
        if not self.affine:
            require(
                self.quantizer != "hqq",
                "quantizer",
                "hqq",
                f"fits offsets, and {self.quant_type} has none; take rtn or gptq, or an integer type",
            )
            for field, plain in (("fit", "minmax"), ("offset_dtype", "float16")):
                value = getattr(self, field)
                require(value == plain, field, value, f"{self.quant_type} has no offsets; leave it out")
        if self.quantizer == "hqq":
            require(
                self.fit in ("minmax", "hqq"),
                "fit",
                self.fit,
                "quantizer='hqq' is a fit of its own; leave it out",
            )
            object.__setattr__(self, "fit", "hqq")
        for field, usual in (("desc_act", False), ("static_groups", False), ("damp_percent", 0.01)):
            value = getattr(self, field)
            require(
                value == usual or self.quantizer == "gptq",
                field,
                value,
                f"quantizer={self.quantizer!r} has no such option",
            )
        require(
            not self.desc_act or self.static_groups,
            "desc_act",
            self.desc_act,
            "needs static_groups=True: columns taken out of order would give a group's scale to scattered inputs, and the "
            "inputs of a group must be neighbours here (QA-LoRA sums over them)",
        )

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return int(self.quant_type[-1])

    @property
    def affine(self) -> bool:
        """True for the integer types, whose float offset QA-LoRA merges into."""
        return self.quant_type in AFFINE_TYPES


@dataclass(frozen=True)
class TrainConfig:
    """One training run: optimizer, schedule, batch, evaluation.

    ``shards`` splits each batch into that many pieces whose gradients are added in order; it belongs to the
    configuration, not to the machine, so that any number of ``threads`` gives the same bytes.
    ``lora_plus_ratio`` multiplies the learning rate of every B (LoRA+, arXiv 2402.12354).

    ``optimizer``: ``adamw`` keeps two numbers a parameter, m and v, in its own type · ``adamw_8bit`` in 8
    bits, where it has 4096 elements or more (arXiv 2110.02861, as bitsandbytes) · ``paged_adamw`` and
    ``paged_adamw_8bit`` the same, with the same result, in a file that is mapped into memory a piece at a
    time (QLoRA's paged optimizers) · ``sgd``, with ``momentum``.

    Less memory for the same step: ``gradient_checkpointing`` keeps a sixth to a quarter of each block;
    ``logits_chunk`` takes that many rows of logits at a time (0: all at once), which counts where the
    vocabulary is large; ``gradient_accumulation_steps`` makes a step of that many batches of ``batch_size``,
    one after another.

    >>> TrainConfig(steps=0)
    Traceback (most recent call last):
    minilora.config.ConfigError: steps=0: must be a whole number, at least 1
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    lora_plus_ratio: float = 1.0
    gradient_checkpointing: bool = False
    logits_chunk: int = 0
    gradient_accumulation_steps: int = 1
    shards: int = 2
    eval_every: int = 0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "gradient_accumulation_steps", "shards"):
            _whole(getattr(self, field), field)
        for field in ("logits_chunk", "warmup_steps", "eval_every", "checkpoint_every", "seed"):
            _whole(getattr(self, field), field, 0)
        for field in ("learning_rate", "eps", "lora_plus_ratio", "max_grad_norm"):
            _number(getattr(self, field), field, 0, open_low=True)
        _number(self.weight_decay, "weight_decay", 0)
        for field in ("beta1", "beta2", "momentum"):
            _number(getattr(self, field), field, 0, 1)
            require(getattr(self, field) < 1, field, getattr(self, field), "must be below 1")
        require(
            self.optimizer in OPTIMIZERS,
            "optimizer",
            self.optimizer,
            f"choose one of {', '.join(OPTIMIZERS)} "
            "(transformers' adamw_torch is adamw here, its paged_adamw_32bit is paged_adamw)",
        )
        require_in(self.schedule, ("cosine", "constant"), "schedule")


MOST_TOKENS = 2**24
"""Of a planned batch: its token ids are the only numbers that a plan makes."""
PLAN_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "method", "target_modules", "optimizer", "dtype"), (str,)),
    **dict.fromkeys(("subset_modules", "quant_type"), (str, type(None))),
    **dict.fromkeys(("bits", "context"), (int, type(None))),
    **dict.fromkeys(("double_quant", "use_dora", "gradient_checkpointing"), (bool,)),
}
"""Types that no other check asks for."""


@dataclass(frozen=True)
class PlanConfig:
    """What decides the memory of a training run. Example: ``minilora memory --model llama-7b --method lora
    --r 64``

    ``model``: a built-in architecture, ``smollm2``, a ``.gguf`` file, a Hugging Face folder or its
    ``config.json``. ``context`` is the length of each of ``batch_size`` sequences. ``quant_type`` is nf4 for
    qlora and int4 for qalora unless it, or ``bits``, is given. ``dtype`` is of dense weights and of all that
    is computed: float32 is what minilora trains in; float16 stands for the half precision of papers that
    train on GPUs.

    >>> PlanConfig(model="llama-7b", method="qlora", bits=3).quant_type
    'nf3'
    """

    model: str = (
        "tiny"  # a built-in architecture, smollm2, a .gguf file, a Hugging Face folder or its config.json
    )
    method: str = "lora"  # full, subset, lora, qlora or qalora
    r: int = 8  # rank of the adapters
    target_modules: str = "all-linear"  # or attention, mlp, or names such as q_proj,v_proj
    subset_modules: str | None = None  # default: the last block
    bits: int | None = None  # 2, 3, 4 or 8; default 4
    quant_type: str | None = None  # nf2 … nf8, fp4 (qlora); int2 … int8 (qalora)
    group_size: int = 32  # inputs that share a scale and an offset (qalora)
    block_size: int = 64  # weights that share a scale (qlora)
    double_quant: bool = True  # scales quantized themselves (qlora)
    use_dora: bool = False  # train the length of each row apart
    lora_dropout: float = 0.0
    optimizer: str = "adamw"  # adamw_8bit, paged_adamw, paged_adamw_8bit or sgd take less
    batch_size: int = 1  # sequences
    context: int | None = None  # default: 512, or all that the model has
    shards: int = 2  # pieces of a batch, a worker (thread) each
    gradient_accumulation_steps: int = 1  # batches of a step, one after another
    gradient_checkpointing: bool = False  # keep a sixth to a quarter of each block, compute the rest again
    logits_chunk: int = 0  # rows of logits at a time; 0: all
    dtype: str = "float32"  # of dense weights and of what is computed; float64, or float16 as papers count

    def __post_init__(self) -> None:
        for name, kinds in PLAN_TYPES.items():
            value = getattr(self, name)
            require(
                type(value) in kinds, name, value, f"must be {' or '.join(kind.__name__ for kind in kinds)}"
            )
        require_in(self.method, TRAINED, "method")
        require_in(self.optimizer, OPTIMIZERS, "optimizer")
        require_in(self.dtype, DTYPES, "dtype")
        for name in ("batch_size", "context", "shards"):
            value = getattr(self, name)
            require(
                (value is None and name == "context") or (isinstance(value, int) and value >= 1),
                name,
                value,
                "must be a whole number, at least 1",
            )
        require(
            self.batch_size * (self.context or 512) <= MOST_TOKENS,
            "batch_size",
            self.batch_size,
            f"times context={self.context or 512} must be at most {MOST_TOKENS:,} tokens",
        )
        require(self.shards <= 64, "shards", self.shards, "must be at most 64; a worker takes one each")
        TrainConfig(
            batch_size=self.batch_size,
            shards=self.shards,
            logits_chunk=self.logits_chunk,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )
        if self.quantized:
            allowed = CODEBOOK_TYPES if self.method == "qlora" else AFFINE_TYPES
            kind = self.quant_type or f"{'nf' if self.method == 'qlora' else 'int'}{self.bits or 4}"
            require(
                kind in allowed,
                "bits" if self.quant_type is None else "quant_type",
                self.quant_type or self.bits,
                f"method {self.method!r} stores {', '.join(allowed)}",
            )
            require(
                self.bits in (None, int(kind[-1])), "bits", self.bits, f"quant_type={kind!r} has {kind[-1]}"
            )
            object.__setattr__(self, "quant_type", kind)
            object.__setattr__(self, "bits", int(kind[-1]))
        else:
            for name in ("bits", "quant_type"):
                value = getattr(self, name)
                require(
                    value in (None, 32) if name == "bits" else value is None,
                    name,
                    value,
                    f"method {self.method!r} stands on dense weights; qlora and qalora quantize",
                )
        require(
            self.subset_modules is None or self.method == "subset",
            "subset_modules",
            self.subset_modules,
            "is for method 'subset'",
        )
        require(
            not self.use_dora or self.method in ("lora", "qlora"),
            "use_dora",
            True,
            "needs an adapter whose merge may change rows: method lora or qlora",
        )
        self.lora()
        if self.quantized:
            self.quant()

    @property
    def quantized(self) -> bool:
        """Whether the frozen base is stored in few bits."""
        return self.method in ("qlora", "qalora")

    def lora(self) -> LoraConfig:
        """The adapter."""
        return LoraConfig(
            self.r,
            target_modules=expand_modules(self.target_modules),
            lora_dropout=self.lora_dropout,
            use_dora=self.use_dora,
            use_qalora=self.method == "qalora",
        )

    def quant(self) -> QuantConfig:
        """The storage of the base."""
        return QuantConfig(self.quant_type or "nf4", self.block_size, self.double_quant, self.group_size)

    @property
    def title(self) -> str:
        """One line."""
        parts = [Path(self.model).name or self.model, self.method]
        if self.method in ("lora", "qlora", "qalora"):
            parts.append(f"r = {self.r} on {self.target_modules}" + (", DoRA" if self.use_dora else ""))
        if self.quantized and self.quant().affine:
            parts.append(f"{self.quant_type}, groups of {self.group_size}")
        elif self.quantized:
            parts.append(
                f"{self.quant_type}, blocks of {self.block_size}" + ", double quantized" * self.double_quant
            )
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"batch {self.batch_size} × {self.context or 512} tokens", self.optimizer]
        parts += ["blocks checkpointed"] if self.gradient_checkpointing else []
        parts += [f"logits by {self.logits_chunk} rows"] if self.logits_chunk else []
        return " · ".join(parts)


@dataclass(frozen=True)
class PretrainConfig:
    """How the base is made. Example: ``minilora pretrain --steps 100 --out runs/base``

    Without ``text`` the corpus is the one of the shipped base: Python's language reference, docstrings of the
    standard library's training modules and generated catalogue pages. An interrupted run continues when the
    command is repeated.
    """

    out: str = "runs/base"
    text: str | None = None  # any UTF-8 text file instead of the built-in corpus
    steps: int = 5000
    batch_size: int = 16
    tokens: int = 208  # length of a training sequence
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    seed: int = 0
    checkpoint_every: int = 250
    threads: int | None = None

    def __post_init__(self) -> None:
        limit = ModelConfig().context_length
        require(2 <= self.tokens <= limit, "tokens", self.tokens, f"must be from 2 to context_length={limit}")
        self.train()

    def train(self) -> TrainConfig:
        """The trainer's part."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.1,
            beta2=0.98,
            warmup_steps=min(self.warmup_steps, self.steps),
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
        )

    def command(self) -> str:
        """The command that repeats it."""
        text = f" --text {Path(self.text).name}" if self.text else ""
        return (
            f"minilora pretrain --steps {self.steps} --batch-size {self.batch_size} --tokens {self.tokens} "
            f"--learning-rate {self.learning_rate:g} --seed {self.seed}{text}"
        )
