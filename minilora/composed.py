"""Configurations composed of others, and their settings by flat name.

`RunConfig(lora=LoraConfig(r=8))` holds its settings in parts. A command line and a row of results are flat:
there the same setting is `r`. The flat name is the field's own name, which no two parts share; its path is
`lora.r`. Flags, columns and fingerprints are made from `settings_in`. So a setting is written in one place:
the field of its configuration.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from minilora.config import (
    AFFINE_TYPES,
    CODEBOOK_TYPES,
    DERIVED,
    DTYPES,
    MODULE_GROUPS,
    OPTIMIZERS,
    TRAINED,
    ConfigError,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    TrainConfig,
    require,
    require_in,
)

Config = TypeVar("Config")

TASKS = ("products", "python", "text", "jsonl")
SPLITS = ("validation", "test")


class Setting(NamedTuple):
    """One setting of a composed configuration."""

    path: str
    """Path of its field, such as `lora.r`."""
    type: Any
    """Type of its flat value."""
    default: Any
    """Flat value if it is not given."""
    help: str
    """What it is, from the `Parameters` of its class."""
    role: str | None = None
    """`DERIVED`, `PROGRESS`, `LABEL` or nothing (`minilora.config`)."""
    used_by: str | None = None
    """The kind of weight, quantizer or method that reads it; None: all."""


def settings_in(kind: type) -> Mapping[str, Setting]:
    """Return the settings of a configuration and of its parts by flat name, in the order of their fields.

    >>> settings_in(QuantConfig)["block_size"].help
    'Weights that share a scale (codebooks).'

    Raises
    ------
    TypeError
        Two parts have a field of the same name.
    """
    return _settings_in(kind)


@lru_cache(maxsize=16)
def _settings_in(kind: Any) -> Mapping[str, Setting]:
    found: dict[str, Setting] = {}
    hints, meanings = _hints(kind), parameters_of(kind)
    for part in fields(kind):
        default = part.default if part.default_factory is MISSING else part.default_factory()
        if (inside := _part(hints[part.name])) is not None:
            start = {} if default is None else flatten(default)
            inner = {
                name: s._replace(path=f"{part.name}.{s.path}", default=start.get(name, s.default))
                for name, s in settings_in(inside).items()
            }
        elif part.metadata.get("role") == DERIVED:
            continue
        else:
            kind_of, meaning = _flat_type(hints[part.name]), meanings.get(part.name, "")
            role, used_by = part.metadata.get("role"), part.metadata.get("used_by")
            inner = {part.name: Setting(part.name, kind_of, flat(default), meaning, role, used_by)}
        if twice := found.keys() & inner.keys():
            raise TypeError(f"{kind.__name__}: two settings are called {', '.join(twice)}")
        found |= inner
    return found


@lru_cache(maxsize=16)
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _part(hint: Any) -> Any:
    """Return the configuration in `LoraConfig` or `QuantConfig | None`, if there is one."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((kind for kind in kinds if is_dataclass(kind)), None)


def _flat_type(hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return str
    return str | None if get_origin(hint) not in (None, Union, UnionType) else hint


def parameters_of(kind: type) -> dict[str, str]:
    """Return name → meaning from the `Parameters` section of a class's numpydoc docstring.

    >>> parameters_of(LoraConfig)["r"]
    'Rank of A and B.'
    """
    found: dict[str, list[str]] = {}
    lines = cleandoc(kind.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Parameters"), len(lines))
    current: list[str] = []
    for line, following in pairwise([*lines[start + 2 :], ""]):
        if following.strip().startswith("---"):
            break  # the head of the next section
        if line.startswith("    "):
            current.append(line.strip())
        elif line.strip():
            current = found.setdefault(line.split(":")[0].strip(), [])
    return {name: " ".join(text) for name, text in found.items()}


def summaries_in(kind: type) -> dict[str, str]:
    """Return part → first line of its class's docstring; the configuration's own under the empty name.

    >>> summaries_in(PretrainConfig)["train"]
    'One training run: optimizer, schedule, batch, evaluation.'
    """
    kinds = {"": kind} | {name: part for name, hint in _hints(kind).items() if (part := _part(hint))}
    return {name: (each.__doc__ or "").split("\n")[0] for name, each in kinds.items()}


def flat(value: Any) -> Any:
    """Return a field's value as one cell of a row holds it.

    >>> flat(("q_proj", "v_proj")), flat({"q_proj": 4}), flat({})
    ('q_proj,v_proj', 'q_proj=4', None)
    """
    if isinstance(value, tuple):
        return next((name for name, group in MODULE_GROUPS.items() if group == value), ",".join(value))
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number}" for name, number in value.items()) or None
    return value


def flatten(config: Any) -> dict[str, Any]:
    """Return flat name → value of a composed configuration; None for those of a part that is not there."""
    found = {}
    for name, setting in settings_in(type(config)).items():
        value = config
        for step in setting.path.split("."):
            value = getattr(value, step, None)
        found[name] = flat(value)
    return found


def change(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a configuration with some settings changed; None leaves a setting as it is.

    Parameters
    ----------
    config
        A composed configuration.
    settings
        Flat name (`r`) or path (`lora.r`) → value, as a field or as a cell of a row holds it.

    Raises
    ------
    ConfigError
        A setting that does not exist, or a value that its configuration refuses.

    Examples
    --------
    >>> change(LoraConfig(), {"target_modules": "attention", "rank_pattern": "q_proj=2"}).rank_pattern
    {'q_proj': 2}
    """
    kind: Any = type(config)
    hints, own, parts = _hints(kind), dict[str, Any](), dict[str, dict[str, Any]]()
    for name, value in settings.items():
        if value is None:
            continue
        first, _, rest = setting_named(kind, name, value).path.partition(".")
        if rest:
            parts.setdefault(first, {})[rest] = value
        elif isinstance(value, str) and get_origin(hints[first]) in (Mapping, abc.Mapping):
            own[first] = _read_pattern(value, first, get_args(hints[first])[1])
        else:
            own[first] = value
    for first, inner in parts.items():
        part = getattr(config, first)
        own[first] = change(_part(hints[first])() if part is None else part, inner)
    return replace(config, **own)  # type: ignore[type-var]


def setting_named(kind: type, name: str, value: Any = None) -> Setting:
    """Return a setting by its flat name or its path; refuse one that does not exist."""
    known, last = settings_in(kind), name.rpartition(".")[2]
    good = last in known and name in (last, known[last].path)
    require(good, name, value, f"no such setting; there are {', '.join(known)}")
    return known[last]


def _read_pattern(text: str, name: str, number: type) -> dict[str, Any]:
    """Read `q_proj=4,up_proj=2`."""
    try:
        pairs = (part.rsplit("=", 1) for part in text.split(",") if part.strip())
        return {module.strip(): number(value) for module, value in pairs}
    except ValueError:
        raise ConfigError(
            f"{name}={text!r}: give module names with numbers, such as q_proj=4,up_proj=2"
        ) from None


@dataclass(frozen=True)
class DataConfig:
    """What a run trains on, and what it is judged by.

    Parameters
    ----------
    task
        products (catalogue entries), python (documentation), text (a text file) or jsonl (your examples).
    text_path
        UTF-8 text file of task text.
    data
        JSONL file of your own examples, with prompt and completion, messages, or text; makes the task jsonl.
    n_train
        Training examples of a generated task.
    n_eval
        Held-out examples that the run is judged by.
    max_length
        Longest example, in tokens of a real model.
    packing
        Put several short examples into one row of max_length tokens.
    split
        Held-out examples of the validation or the test split.

    Examples
    --------
    >>> DataConfig(data="mine.jsonl").task
    'jsonl'
    >>> DataConfig(task="text")
    Traceback (most recent call last):
    minilora.config.ConfigError: text_path=None: task 'text' needs a file, and only that task takes one
    """

    task: str = "products"
    text_path: str | None = None
    data: str | None = None
    n_train: int = 4000
    n_eval: int = 256
    max_length: int = 512
    packing: bool = False
    split: str = "test"

    def __post_init__(self) -> None:
        if self.data is not None and self.task == DataConfig.task:
            object.__setattr__(self, "task", "jsonl")
        require_in(self.task, TASKS, "task")
        require_in(self.split, SPLITS, "split")
        require(
            isinstance(self.n_eval, int) and self.n_eval >= 1, "n_eval", self.n_eval, "must be at least 1"
        )
        for name, task in (("text_path", "text"), ("data", "jsonl")):
            require(
                (getattr(self, name) is not None) == (self.task == task),
                name,
                getattr(self, name),
                f"task {task!r} needs a file, and only that task takes one",
            )
        require(self.max_length >= 8, "max_length", self.max_length, "must be at least 8 tokens")


LARGEST_PLANNED_BATCH = 2**24
"""Largest batch a plan accepts, in tokens: its token ids are the one array of a plan that is really made."""
PLAN_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "method", "target_modules", "optimizer", "dtype"), (str,)),
    **dict.fromkeys(("subset_modules", "quant_type"), (str, type(None))),
    **dict.fromkeys(("bits", "context"), (int, type(None))),
    **dict.fromkeys(("double_quant", "use_dora", "gradient_checkpointing"), (bool,)),
}
"""Types of a plan's settings, where no configuration checks them."""


@dataclass(frozen=True)
class PlanConfig:
    """What decides the memory of a training run.

    A plan is flat, because it reads a third of the settings of a run. Those that are not listed here have the
    meaning of their namesakes in `LoraConfig`, `QuantConfig` and `TrainConfig`.

    Parameters
    ----------
    model
        A built-in architecture, smollm2, a .gguf file, a Hugging Face folder or its config.json.
    method
        full, subset, lora, qlora or qalora.
    subset_modules
        Modules that method subset trains. Default: the last block.
    bits
        2, 3, 4 or 8 bits of the quantized base. Default: 4.
    quant_type
        nf2, nf3, nf4, nf8 or fp4 (qlora); int2, int3, int4 or int8 (qalora). Default: nf4 or int4.
    batch_size
        Sequences in a batch.
    context
        Tokens in a sequence. Default: 512, or all that the model has.
    dtype
        Type of dense weights and of all that is computed: float32 (what minilora trains in), float64, or
        float16 (the half precision of papers that train on GPUs).

    Examples
    --------
    >>> PlanConfig(model="llama-7b", method="qlora", bits=3).quant_type
    'nf3'
    """

    model: str = "tiny"
    method: str = "lora"
    r: int = LoraConfig.r
    target_modules: str = "all-linear"
    subset_modules: str | None = None
    bits: int | None = None
    quant_type: str | None = None
    group_size: int = QuantConfig.group_size
    block_size: int = QuantConfig.block_size
    double_quant: bool = QuantConfig.double_quant
    use_dora: bool = LoraConfig.use_dora
    lora_dropout: float = LoraConfig.lora_dropout
    optimizer: str = TrainConfig.optimizer
    batch_size: int = 1
    context: int | None = None
    shards: int = TrainConfig.shards
    gradient_accumulation_steps: int = TrainConfig.gradient_accumulation_steps
    gradient_checkpointing: bool = TrainConfig.gradient_checkpointing
    logits_chunk: int = TrainConfig.logits_chunk
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._check_types()
        require_in(self.method, TRAINED, "method")
        require_in(self.optimizer, OPTIMIZERS, "optimizer")
        require_in(self.dtype, DTYPES, "dtype")
        require(
            self.batch_size * (self.context or 512) <= LARGEST_PLANNED_BATCH,
            "batch_size",
            self.batch_size,
            f"times context={self.context or 512} must be at most {LARGEST_PLANNED_BATCH:,} tokens",
        )
        require(self.shards <= 64, "shards", self.shards, "must be at most 64; each worker takes one")
        self._namesakes(TrainConfig)
        if self.quantized:
            self._choose_quant_type()
        else:
            for name, values in (("bits", (None, 32)), ("quant_type", (None,))):
                value = getattr(self, name)
                needs = f"method {self.method!r} needs dense weights; qlora and qalora quantize"
                require(value in values, name, value, needs)
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

    def _check_types(self) -> None:
        for name, kinds in PLAN_TYPES.items():
            value = getattr(self, name)
            allowed = f"must be {' or '.join(kind.__name__ for kind in kinds)}"
            require(type(value) in kinds, name, value, allowed)
        for name in ("batch_size", "context", "shards"):
            value = getattr(self, name)
            whole = (value is None and name == "context") or (isinstance(value, int) and value >= 1)
            require(whole, name, value, "must be a whole number, at least 1")

    def _choose_quant_type(self) -> None:
        """Fill in `quant_type` and `bits`, of which one may be missing."""
        family, allowed = ("nf", CODEBOOK_TYPES) if self.method == "qlora" else ("int", AFFINE_TYPES)
        kind = self.quant_type or f"{family}{self.bits or 4}"
        name = "bits" if self.quant_type is None else "quant_type"
        stores = f"method {self.method!r} stores {', '.join(allowed)}"
        require(kind in allowed, name, getattr(self, name), stores)
        require(self.bits in (None, int(kind[-1])), "bits", self.bits, f"quant_type={kind!r} has {kind[-1]}")
        object.__setattr__(self, "quant_type", kind)
        object.__setattr__(self, "bits", int(kind[-1]))

    def _namesakes(self, kind: type[Config]) -> Config:
        """Make a configuration from the settings that have its fields' names."""
        names = {part.name for part in fields(self)} & {part.name for part in fields(kind)}  # type: ignore[arg-type]
        return change(kind(), {name: getattr(self, name) for name in names})

    @property
    def quantized(self) -> bool:
        """Whether the frozen base is stored in few bits."""
        return self.method in ("qlora", "qalora")

    def lora(self) -> LoraConfig:
        """Return the adapter."""
        return replace(self._namesakes(LoraConfig), use_qalora=self.method == "qalora")

    def quant(self) -> QuantConfig:
        """Return the storage of the base."""
        return self._namesakes(QuantConfig)

    @property
    def title(self) -> str:
        """The plan in one line."""
        parts = [Path(self.model).name or self.model, self.method]
        if self.method in ("lora", "qlora", "qalora"):
            parts.append(f"r = {self.r} on {self.target_modules}" + (", DoRA" if self.use_dora else ""))
        if self.method == "qalora":
            parts.append(f"{self.quant_type}, groups of {self.group_size}")
        if self.method == "qlora":
            twice = ", double quantized" if self.double_quant else ""
            parts.append(f"{self.quant_type}, blocks of {self.block_size}{twice}")
        if self.dtype != "float32":
            parts.append(self.dtype)
        parts += [f"batch {self.batch_size} × {self.context or 512} tokens", self.optimizer]
        if self.gradient_checkpointing:
            parts.append("blocks checkpointed")
        if self.logits_chunk:
            parts.append(f"logits by {self.logits_chunk} rows")
        return " · ".join(parts)


@dataclass(frozen=True)
class PretrainConfig:
    """How the base is made.

    Parameters
    ----------
    out
        Folder for the base, its log and the checkpoint.
    text
        UTF-8 text file to train on. Default: the corpus of the shipped base.
    tokens
        Tokens in a training sequence.
    threads
        Worker threads; they change the speed and never the result. Default: all cores.
    train
        The training run.

    Notes
    -----
    The corpus of the shipped base is Python's language reference, docstrings of the standard library's
    training modules and generated catalogue pages. An interrupted run continues when it is repeated.

    Examples
    --------
    >>> PretrainConfig().train.learning_rate
    0.003
    """

    out: str = "runs/base"
    text: str | None = None
    tokens: int = 208
    threads: int | None = None
    train: TrainConfig = TrainConfig(
        steps=5000, learning_rate=3e-3, weight_decay=0.1, beta2=0.98, warmup_steps=100, checkpoint_every=250
    )

    def __post_init__(self) -> None:
        limit = ModelConfig().context_length
        require(2 <= self.tokens <= limit, "tokens", self.tokens, f"must be from 2 to context_length={limit}")

    def training(self) -> TrainConfig:
        """Return what the trainer does: a warm-up no longer than the run."""
        return replace(self.train, warmup_steps=min(self.train.warmup_steps, self.train.steps))

    def command(self) -> str:
        """Return the command that repeats it."""
        train = self.train
        text = f" --text {Path(self.text).name}" if self.text else ""
        return (
            f"minilora pretrain --steps {train.steps} --batch-size {train.batch_size} --tokens {self.tokens} "
            f"--learning-rate {train.peak_learning_rate:g} --seed {train.seed}{text}"
        )
