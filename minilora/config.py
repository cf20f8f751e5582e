"""Configuration: small frozen dataclasses, validated once, with the names of PEFT, bitsandbytes and Llama.

Each setting is written once, as a field here with one entry in its class's `Parameters`. The command line,
the rows of a sweep and the fingerprint of a run are made from these fields (`minilora.composed`). A field's
metadata says what the dataclass alone cannot:

- `role`: `DERIVED` (decided by another setting), `PROGRESS` (changes no result) or `LABEL` (a name).
- `used_by`: the kind of weight, quantizer or method that reads the field; the others ignore it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
LINEAR_MODULES = ATTENTION_MODULES + MLP_MODULES
MODULE_GROUPS = {"all-linear": LINEAR_MODULES, "attention": ATTENTION_MODULES, "mlp": MLP_MODULES}

TINY = "tiny"
"""Name of the base that ships in the package. Any other name is a real model with a tokenizer."""

TRAINED = ("full", "subset", "lora", "qlora", "qalora")
"""Methods that train."""
CONTROLS = ("base", "quantized_base")
"""Methods that only measure."""
METHODS = CONTROLS + TRAINED
ADAPTERS = ("lora", "qlora", "qalora")
"""Methods with a low-rank adapter."""
QUANTIZED = ("qlora", "qalora", "quantized_base")
"""Methods over a base stored in few bits."""

CODEBOOK_TYPES = ("nf2", "nf3", "nf4", "nf8", "fp4")
AFFINE_TYPES = ("int2", "int3", "int4", "int8")
QUANTIZERS = ("rtn", "gptq", "hqq")
FITS = ("minmax", "symmetric", "mse", "hqq")
OFFSET_STORES = ("float16", "float32", "zero")

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd")
DTYPES = ("float32", "float64", "float16")

SVD_INITS = ("pissa", "loftq")
INITS = ("normal", "kaiming", "gaussian", *SVD_INITS)

DERIVED, PROGRESS, LABEL = "derived", "progress", "label"
"""Roles of a field that is not an ordinary setting of a run."""


class ConfigError(ValueError):
    """A setting that cannot work. The message names field, value, what is allowed and the fix."""


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """Raise `ConfigError("field=value: allowed")` unless `ok`.

    >>> require(False, "r", 0, "must be at least 1")
    Traceback (most recent call last):
    minilora.config.ConfigError: r=0: must be at least 1
    """
    if not ok:
        raise ConfigError(f"{field}={value!r}: {allowed}")


def require_in(value: Any, allowed: Collection[Any], field: str) -> None:
    """Raise unless `value` is one of `allowed`."""
    require(value in allowed, field, value, "choose one of " + ", ".join(map(str, allowed)))


def _whole(value: Any, field: str, least: int = 1) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, field, value, f"must be a whole number, at least {least}")


def _number(
    value: Any, field: str, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    # NaN fails the comparison, and 10**400 is above the largest float
    ok = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max and low <= value <= high
    ok = ok and not (open_low and value == low)
    require(
        ok, field, value, f"must be a finite number {'above' if open_low else 'from'} {low:g} to {high:g}"
    )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family transformer, with the names of transformers' `LlamaConfig`.

    The defaults are the base that ships in the package.

    Parameters
    ----------
    hidden_act
        `silu` is the SwiGLU MLP (gate, up, down); `gelu_pytorch_tanh` the two-matrix MLP (up, down) of the
        LoRA paper's figure.
    rope_factors : tuple of float, optional
        The head_dim / 2 divisors of the rotary pairs' speeds. All equal is linear scaling; Llama 3 slows only
        the slow pairs. None leaves the speeds.

    Examples
    --------
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
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            _whole(getattr(self, name), name)
        for name in ("context_length", "num_attention_heads", "num_key_value_heads"):
            _whole(getattr(self, name), name)
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
            # JSON turns tuples into lists
            object.__setattr__(self, "rope_factors", tuple(self.rope_factors))
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
    """What to adapt and how, with PEFT's names and meaning.

    Parameters
    ----------
    r
        Rank of A and B.
    lora_alpha
        α; the adapter is multiplied by α / r, or by α / √r with `use_rslora`.
    lora_dropout
        Share of the adapter's inputs that training drops.
    target_modules
        Modules to adapt: all-linear, attention, mlp, or names such as q_proj,v_proj.
    use_rslora
        Scale by α / √r instead of α / r (rsLoRA).
    use_qalora
        Pool the input over the base weight's groups, so that the adapter merges into its offsets (QA-LoRA).
    init_lora_weights
        Start of A and B: normal, kaiming, gaussian (standard deviation 1/r, as PEFT), pissa or loftq.
    use_dora
        Train the length of each row of W + ΔW separately (DoRA).
    loftq_iter
        Rounds of LoftQ's alternating decomposition.
    rank_pattern
        Rank of single modules, such as layers.3.mlp.up_proj=2; a name or the end of one.
    alpha_pattern
        α of single modules, such as q_proj=32; a name or the end of one.

    Notes
    -----
    `normal` draws A with standard deviation 1/√(3·in): PEFT's `kaiming` has the same variance, and both are
    independent of r. `gaussian` depends on r and so confounds a rank sweep. B starts at zero. `pissa` and
    `loftq` start both factors from a decomposition (`minilora.variants`).

    References
    ----------
    LoRA: arXiv 2106.09685. rsLoRA: arXiv 2312.03732. QA-LoRA: arXiv 2309.14717. DoRA: arXiv 2402.09353.

    Examples
    --------
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
    use_qalora: bool = field(default=False, metadata={"role": DERIVED})
    init_lora_weights: str = "normal"
    use_dora: bool = False
    loftq_iter: int = 1
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

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
            require(
                not self.use_dora,
                "use_dora",
                True,
                "use_qalora merges ΔW into offsets, and DoRA also changes the length of rows; choose one",
            )
            require(
                self.init_lora_weights not in SVD_INITS,
                "init_lora_weights",
                self.init_lora_weights,
                "starts from a decomposition over all inputs, and use_qalora sees sums of groups; use normal",
            )

    @property
    def scaling(self) -> float:
        """The factor s of s·BA: α/r, or α/√r for rsLoRA. It is computed here and nowhere else."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def of(self, module: str) -> LoraConfig:
        """Return the configuration of one module by its full name; the first pattern that matches counts."""
        r = next((v for k, v in self.rank_pattern.items() if matches(module, k)), self.r)
        alpha = next((v for k, v in self.alpha_pattern.items() if matches(module, k)), self.lora_alpha)
        return replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})


def matches(name: str, target: str) -> bool:
    """PEFT's rule: the target is the module's last part or a suffix of whole parts, never a substring.

    >>> name = "model.layers.0.self_attn.q_proj"
    >>> matches(name, "self_attn.q_proj"), matches(name, "proj")
    (True, False)
    """
    return name == target or name.endswith("." + target)


def expand_modules(text: str) -> tuple[str, ...]:
    """Turn `all-linear`, `attention`, `mlp` or a comma list into module names.

    >>> expand_modules("q_proj,v_proj")
    ('q_proj', 'v_proj')
    """
    return MODULE_GROUPS.get(text) or tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class QuantConfig:
    """How a frozen weight is stored, and how its codes are found.

    Parameters
    ----------
    quant_type
        Codebook nf2, nf3, nf4, nf8 or fp4; or integers int2, int3, int4 or int8 (w = scale·q + offset).
    block_size
        Weights that share a scale (codebooks).
    double_quant
        Quantize the scales themselves (codebooks).
    group_size
        Inputs that share a scale and an offset (integers).
    quantizer
        How codes are found: rtn (nearest code), gptq (needs calibration data) or hqq (fits the offsets).
    fit
        How scale and offset are found: minmax, symmetric or mse (integers).
    offset_dtype
        How offsets are stored: float16, float32, or zero, GPTQ's whole zero point (integers).
    desc_act
        Quantize columns by falling activation (gptq); needs static_groups.
    static_groups
        Fix each group's scale before any column is rounded (gptq).
    damp_percent
        Share of the Hessian's mean diagonal that is added to the diagonal (gptq).

    References
    ----------
    QLoRA (NF4, double quantization): arXiv 2305.14314, section 3. GPTQ: arXiv 2210.17323.

    Examples
    --------
    >>> QuantConfig("int4").bits, QuantConfig("int4").affine
    (4, True)
    >>> QuantConfig("nf4", quantizer="hqq")
    Traceback (most recent call last):
    minilora.config.ConfigError: quantizer='hqq': nf4 has no offsets to fit; take rtn, gptq or an integer type
    """

    quant_type: str = "nf4"
    block_size: int = field(default=64, metadata={"used_by": "codebook"})
    double_quant: bool = field(default=True, metadata={"used_by": "codebook"})
    group_size: int = field(default=32, metadata={"used_by": "affine"})
    quantizer: str = "rtn"
    fit: str = field(default="minmax", metadata={"used_by": "affine"})
    offset_dtype: str = field(default="float16", metadata={"used_by": "affine"})
    desc_act: bool = field(default=False, metadata={"used_by": "gptq"})
    static_groups: bool = field(default=False, metadata={"used_by": "gptq"})
    damp_percent: float = field(default=0.01, metadata={"used_by": "gptq"})

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
                f"{self.quant_type} has no offsets to fit; take rtn, gptq or an integer type",
            )
            for name, plain in (("fit", "minmax"), ("offset_dtype", "float16")):
                value = getattr(self, name)
                require(value == plain, name, value, f"{self.quant_type} has no offsets; leave it out")
        if self.quantizer == "hqq":
            require(
                self.fit in ("minmax", "hqq"),
                "fit",
                self.fit,
                "quantizer='hqq' is a fit of its own; leave it out",
            )
            object.__setattr__(self, "fit", "hqq")
        for name, usual in (("desc_act", False), ("static_groups", False), ("damp_percent", 0.01)):
            value = getattr(self, name)
            require(
                value == usual or self.quantizer == "gptq",
                name,
                value,
                f"quantizer={self.quantizer!r} has no such option",
            )
        require(
            not self.desc_act or self.static_groups,
            "desc_act",
            self.desc_act,
            "needs static_groups=True: QA-LoRA sums over neighbouring inputs, and reordered columns would "
            "scatter the inputs of a group",
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

    Parameters
    ----------
    steps
        Optimizer steps.
    batch_size
        Sequences in a batch.
    learning_rate
        Peak learning rate. Default: the method's own in a run, 0.002 for a `Trainer` by itself.
    optimizer
        adamw, adamw_8bit (moments in 8 bits), paged_adamw, paged_adamw_8bit (moments in a file) or sgd.
    weight_decay
        Decoupled weight decay of AdamW.
    beta1
        Decay of Adam's first moment.
    beta2
        Decay of Adam's second moment.
    eps
        Term in the denominator of Adam's update.
    momentum
        Momentum of sgd.
    schedule
        Learning rate after the warm-up: cosine down to zero, or constant.
    warmup_steps
        Steps of linear warm-up; a run shortens it to its number of steps.
    max_grad_norm
        Joint norm to which gradients are clipped.
    lora_plus_ratio
        Factor on the learning rate of every B (LoRA+).
    gradient_checkpointing
        Keep a sixth to a quarter of each block's activations and compute the rest again.
    logits_chunk
        Rows of logits computed at a time; 0: all at once. Saves memory where the vocabulary is large.
    gradient_accumulation_steps
        Batches that make one step, one after another.
    shards
        Pieces of a batch, one per worker thread; part of the result, unlike the number of threads.
    eval_every
        Steps between evaluations on the validation split; 0 for none.
    checkpoint_every
        Steps between checkpoints; 0 for none.
    seed
        Seed of everything a run draws: adapter start, order of examples, dropout, calibration examples.

    References
    ----------
    AdamW: arXiv 1711.05101. 8-bit optimizers: arXiv 2110.02861. LoRA+: arXiv 2402.12354. Paged optimizers:
    QLoRA, arXiv 2305.14314, section 3.

    Examples
    --------
    >>> TrainConfig(steps=0)
    Traceback (most recent call last):
    minilora.config.ConfigError: steps=0: must be a whole number, at least 1
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    lora_plus_ratio: float = field(default=1.0, metadata={"used_by": "adapter"})
    gradient_checkpointing: bool = False
    logits_chunk: int = 0
    gradient_accumulation_steps: int = 1
    shards: int = 2
    eval_every: int = field(default=0, metadata={"role": PROGRESS})
    checkpoint_every: int = field(default=0, metadata={"role": PROGRESS})
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "shards"):
            _whole(getattr(self, name), name)
        for name in ("logits_chunk", "warmup_steps", "eval_every", "checkpoint_every", "seed"):
            _whole(getattr(self, name), name, 0)
        if self.learning_rate is not None:
            _number(self.learning_rate, "learning_rate", 0, open_low=True)
        for name in ("eps", "lora_plus_ratio", "max_grad_norm"):
            _number(getattr(self, name), name, 0, open_low=True)
        _number(self.weight_decay, "weight_decay", 0)
        for name in ("beta1", "beta2", "momentum"):
            _number(getattr(self, name), name, 0, 1)
            require(getattr(self, name) < 1, name, getattr(self, name), "must be below 1")
        require(
            self.optimizer in OPTIMIZERS,
            "optimizer",
            self.optimizer,
            f"choose one of {', '.join(OPTIMIZERS)} "
            "(transformers' adamw_torch is adamw here, its paged_adamw_32bit is paged_adamw)",
        )
        require_in(self.schedule, ("cosine", "constant"), "schedule")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up, in a `Trainer` by itself."""
        return 2e-3 if self.learning_rate is None else self.learning_rate
