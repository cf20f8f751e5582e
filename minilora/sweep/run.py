"""One run: a configuration goes in, one flat row comes out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from tqdm.auto import tqdm

import minilora
from minilora import memory
from minilora.adapter import Adapter
from minilora.config import ADAPTERS, LoraConfig, QuantConfig, expand_modules, require
from minilora.data.sft import SFTTask
from minilora.data.tasks import Batch, Task
from minilora.data.tokenizer import Tokenizer
from minilora.formats.checkpoint import load_model, save_model
from minilora.formats.files import FileError, read_json, write_file
from minilora.formats.peft import fill_adapter, load_adapter, save_adapter
from minilora.generation import generate
from minilora.injection import full, inject_lora, subset
from minilora.merging import merge
from minilora.quant.blocks import GGUF_BLOCK, BlockWeight
from minilora.quant.model import dequantize_model, quantize_model
from minilora.sweep.inputs import base_of, check_memory, make_run_task
from minilora.sweep.settings import DEFAULT_RATES, NAMES, TINY, RunConfig
from minilora.sweep.warm import warm_kernels
from minilora.threads import Workers, available_threads, single_blas
from minilora.training.loss import evaluate, loss_and_grads
from minilora.training.trainer import CHECKPOINT, Trainer, batch_indices
from minilora.transformer import Transformer

ADAPTER = "adapter"
"""Where a run's folder keeps its adapter, as PEFT does."""

CALIBRATION = 128
"""Training examples that GPTQ looks at."""


def build(config: RunConfig, base: Transformer) -> Transformer:
    """The model of a run before training: what is frozen, what is quantized, what trains."""
    # the stream of initialisation; data and dropout have their own. With r in it, two ranks do not share A's
    # first rows
    rng = np.random.default_rng([config.seed, 0, config.r or 0])
    if config.method == "full":
        return full(dequantize_model(base))
    if config.method == "subset":
        return subset(dequantize_model(base), expand_modules(config.subset_modules))
    if config.init_lora_weights == "loftq":
        return inject_lora(dequantize_model(base), config.lora(), rng, quant=config.base_quant())
    model = frozen_base(config, base)
    return inject_lora(model, config.lora(), rng) if config.method in ADAPTERS else model


def frozen_base(config: RunConfig, base: Transformer) -> Transformer:
    """The base under the adapter, as it is stored.

    The weights of a GGUF are numbers already rounded: LoRA stands on them dequantized, QLoRA and other bits
    round them again, and QA-LoRA takes Q4_1 as it is, which is int4 in groups of 32. The embedding, which
    nobody trains, stays as stored.
    """
    if config.method == "base":
        return base
    if not config.quantized:
        return dequantize_model(base, table=False)
    quant = config.base_quant()
    as_stored = quant == QuantConfig("int4", group_size=GGUF_BLOCK) and all(
        isinstance(linear.weight, BlockWeight) and linear.weight.offset_group
        for block in base.blocks
        for _, _, linear in block.linears()
    )
    return (
        base
        if as_stored
        else quantize_model(base, quant, calibration(config) if quant.quantizer == "gptq" else ())
    )


def under_adapter(config: RunConfig, base: Transformer) -> Transformer:
    """The base of a trained adapter that only computes: LoRA's may stay in its blocks, which are the same
    numbers."""
    return base if config.method == "lora" else frozen_base(config, base)


def calibration(config: RunConfig) -> list[Any]:
    """Token ids of training examples, drawn by the run's seed: what GPTQ may look at. Never the test or
    validation split."""
    task = make_run_task(config)
    return unpadded(task, np.random.default_rng([config.seed, 3]).permutation(task.n_train)[:CALIBRATION])


def unpadded(task: Task, examples: Sequence[int] | np.ndarray) -> list[Any]:
    """Token ids (1, T) of training examples, one by one: GPTQ would take padding for inputs that matter."""
    batch = task.batch(examples)
    # what follows the last target is padding: PAD of the tiny base; a pretrained model may pad with a token
    # that texts hold too
    ends = batch.mask.shape[1] - batch.mask[:, ::-1].argmax(axis=1)
    return [row[:end][None] for row, end in zip(batch.ids, ends, strict=True)]


def check_buildable(configs: Sequence[RunConfig]) -> None:
    """Build each kind of model once, so that a rank, group size or module that does not fit is refused before
    any work."""
    decides = (
        "model",
        "method",
        "r",
        "target_modules",
        "subset_modules",
        "quant_type",
        "block_size",
        "group_size",
        "quantizer",
        "use_dora",
        "init_lora_weights",
    )
    kinds = {tuple(getattr(config, name) for name in decides): config for config in configs}
    for config in kinds.values():
        base = base_of(config.model).model
        build(replace(config, quantizer="rtn"), base)
        if config.quantizer == "gptq":
            _check_rows(config.quant(), base)


def _check_rows(quant: QuantConfig, base: Transformer) -> None:
    """GPTQ rounds column by column, so a scale must belong to one row: refused before anything trains."""
    size, name = (quant.group_size, "group_size") if quant.affine else (quant.block_size, "block_size")
    for block in base.blocks:
        for _, _, linear in block.linears():
            require(
                linear.shape[1] % size == 0,
                name,
                size,
                f"quantizer='gptq' needs a divisor of in={linear.shape[1]} ({linear.name})",
            )


def check_kept(rows: Sequence[dict[str, Any]]) -> None:
    """Refuse to add to rows of another base or of other data (another Python): they could not be compared."""
    for row in rows:
        base_hash = base_of(row.get("model") or TINY).sha256
        if row.get("base_sha256") not in (None, base_hash):
            raise FileError(
                f"results: row {row['key']} was made on another base (SHA-256 {row['base_sha256'][:12]}, here "
                f"{base_hash[:12]}); choose another name or delete the old folder"
            )
    about = ("model", "task", "text_path", "data", "max_length", "packing", "n_train", "n_eval")
    for row in {
        tuple(row.get(name) for name in about): row for row in rows if row.get("corpus_sha256")
    }.values():
        task = make_run_task(
            RunConfig(method="base", **{name: row[name] for name in about if row.get(name) is not None})
        )
        if row["corpus_sha256"] != task.sha256:
            raise FileError(
                f"results: row {row['key']} was made from other data (SHA-256 {row['corpus_sha256'][:12]}, here "
                f"{task.sha256[:12]}; Python {row.get('python_version')}); choose another name or delete them"
            )


def deploy(config: RunConfig, model: Transformer) -> Transformer:
    """The model as one would ship it: LoRA merged, QLoRA merged and rounded to the same bits again, QA-LoRA
    merged exactly."""
    if config.method == "qlora":
        quant = config.quant()
        return requantize(model, quant, calibration(config) if quant.quantizer == "gptq" else ())
    return merge(model, {"lora": "dense", "qalora": "offsets"}[config.method])[0]


def requantize(model: Transformer, quant: QuantConfig, data: Sequence[Any] = ()) -> Transformer:
    """Merge, and quantize again what was adapted (an adapted head stays dense, as a head always does); GPTQ
    needs token ids."""
    adapted = {name for name, linear in model.linears() if isinstance(linear, Adapter)}
    return quantize_model(merge(model, "dense")[0], quant, data, only=adapted)


def measure(
    model: Transformer,
    task: Task,
    split: str,
    tokenizer: Tokenizer,
    workers: Workers | None = None,
    write_all: bool = True,
    progress: bool = False,
) -> dict[str, float]:
    """Loss on a split; on the test split also what the model writes, for tasks that are judged by it."""
    found = dict(evaluate(model, task.eval_batches(split), workers, progress))
    for name, ending in (("test", ""), ("test_values", "_values"))[: 1 + write_all]:
        if split == "test" and name in task.splits and (prompts := task.prompts(name)):
            scores = task.score(
                name, write(model, prompts, task.max_new_tokens, tokenizer, workers, progress)
            )
            found |= {k + ending: v for k, v in scores.items()}
    return found


def judge(
    config: RunConfig,
    model: Transformer,
    task: Task,
    tokenizer: Tokenizer,
    workers: Workers,
    progress: bool = False,
) -> dict[str, float]:
    """Measures of a trained model, and of what it becomes when it is deployed."""
    row = measure(model, task, config.split, tokenizer, workers, config.write_all, progress)
    if config.method in ADAPTERS:
        deployed = deploy(config, model)
        if config.write_all:
            found = measure(deployed, task, config.split, tokenizer, workers, False, progress)
        else:
            found = evaluate(deployed, task.eval_batches(config.split), workers, progress)
        row |= {f"deployed_{k}": v for k, v in found.items()}
        row["deployed_effective_bits"] = memory.effective_bits(deployed)
    return row


def write(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    tokenizer: Tokenizer,
    workers: Workers | None = None,
    progress: bool = False,
) -> list[str]:
    """Greedy continuations as text, in pieces of so many prompts that caches and logits stay small."""
    size = 50 if model.config.vocab_size < 1000 else 25
    pieces = [prompts[i : i + size] for i in range(0, len(prompts), size)]

    bar = tqdm(total=len(prompts), desc="write", unit="text", disable=not progress, leave=False)

    def one(piece: list[list[int]]) -> list[list[int]]:
        texts = generate(
            model, piece, max_new_tokens, eos=tokenizer.stop_ids, threads=1
        )  # the pieces are what runs in parallel
        bar.update(len(piece))
        return texts

    with single_blas(), bar:
        results = [one(piece) for piece in pieces] if workers is None else workers.map(one, pieces)
    return [tokenizer.decode(tokens) for piece in results for tokens in piece]


def ledger(config: RunConfig, model: Transformer, task: Task, trainer: Trainer | None) -> dict[str, Any]:
    """Bytes by class, parameter counts and effective bits, from the ledger of one more forward and backward
    pass.

    Activations and peak are those of the whole batch at once, as when every shard has a thread.
    """
    trainable, total = memory.count_parameters(model)
    row: dict[str, Any] = {
        "trainable_params": trainable,
        "all_params": total,
        "effective_bits": memory.effective_bits(model),
    }
    row |= {f"bytes_{kind}": n for kind, n in memory.model_bytes(model).items()}
    row |= {"bytes_gradients": 0, "bytes_optimizer": 0, "bytes_activations": 0}
    if trainer is not None:
        whole = replace(trainer.config, shards=1)
        found = memory.measure(model, first_batch(config, task), whole, trainer.optimizer, warm_up=False)
        kinds = found.by_kind()
        row |= {
            f"bytes_{kind}": kinds.get(kind, 0)
            for kind in ("gradients", "optimizer", "logits", "tiles", "temporaries")
        }
        row["bytes_activations"] = sum(entry.nbytes for entry in found.kept)
        row |= {
            "bytes_on_disk": found.on_disk,
            "bytes_peak": found.measured,
            "bytes_peak_predicted": found.peak,
        }
    return row


def first_batch(config: RunConfig, task: Task) -> Batch:
    """The batch of the first step."""
    return task.batch(batch_indices(task.n_train, config.batch_size, 0, config.seed))


def run(
    config: RunConfig,
    folder: str | Path | None = None,
    threads: int = 1,
    checkpoint_every: int = 0,
    progress: bool = False,
    built: Callable[[Transformer], None] | None = None,
    eval_every: int = 0,
) -> dict[str, Any]:
    """Train and measure one configuration; returns its row. With ``folder`` what was learnt is saved there.

    ``built`` is called with the model before it trains.

    With ``checkpoint_every`` too, training continues from the folder's checkpoint if there is one. A folder
    that holds another run is refused. Raises ValueError (or a subclass) for bad input and NonFiniteError if
    training meets NaN or infinity.
    """
    start = time.perf_counter()
    if config.method in DEFAULT_RATES and config.model != TINY:
        check_memory(config)
    start_from = base_of(config.model)
    base, base_hash, tokenizer = start_from.model, start_from.sha256, start_from.tokenizer
    if config.quantizer == "gptq":
        _check_rows(config.quant(), base)
    task = make_run_task(config)
    if progress and isinstance(task, SFTTask):
        print(f"data: {task.report}")
    model = build(config, base)
    if built is not None:
        built(model)
    if folder is not None:
        _claim(Path(folder), config, base_hash)
    row: dict[str, Any] = {**asdict(config), "key": config.key(), "status": "success", "error": None}
    trainer, peft_bytes = None, None
    with Workers(threads) as workers:
        if config.method in DEFAULT_RATES:
            settings = replace(config.train(), checkpoint_every=checkpoint_every, eval_every=eval_every)
            trainer = Trainer(model, task, settings, threads=threads, folder=folder)
            if folder is not None and checkpoint_every and (saved := Path(folder) / CHECKPOINT).is_file():
                trainer.load(saved)
                if progress:
                    print(f"continuing at step {trainer.step} of {config.steps}, from {saved}")
            if progress:
                predicted = memory.measure(
                    model, first_batch(config, task), settings, trainer.optimizer, run=False
                )
                print(f"predicted: {predicted.short()}", flush=True)
            history = trainer.train(progress)
            if progress:
                print(f"after training, {memory.resident_line()}", flush=True)
            last = history.steps[-20:]
            row["train_loss"] = sum(s["loss"] for s in last) / len(last)
            timed = [
                s["seconds"] for s in history.steps if "seconds" in s
            ]  # steps from a checkpoint carry no time
            row["step_seconds"] = float(np.median(timed)) if timed else None
        if (
            folder is not None
        ):  # before it is measured, so that what was learnt outlasts whatever happens then
            if config.method in ADAPTERS:
                peft_bytes = save_adapter(model, config.lora(), Path(folder) / ADAPTER)
            elif trainer is not None:
                save_model(model, Path(folder) / "model.safetensors")
        row |= ledger(config, model, task, trainer)  # before merged weights stand beside the model's
        if progress and trainer is not None:
            real = memory.measure(
                model, first_batch(config, task), trainer.config, trainer.optimizer, warm_up=False
            )
            print(f"measured:  {real.short()}", flush=True)
        trained, trainer = trainer is not None, None  # its states are needed no more
        row |= judge(config, model, task, tokenizer, workers, progress)
    if progress and trained:
        print(f"after evaluation too, {memory.resident_line()}")
    row |= {"bytes_adapter_file": peft_bytes, "corpus_sha256": task.sha256, "base_sha256": base_hash}
    if config.model != TINY:  # a token is no byte
        row = {name: value for name, value in row.items() if name not in ("bpb", "deployed_bpb")}
    return row | environment() | {"seconds": time.perf_counter() - start}


def _claim(folder: Path, config: RunConfig, base_hash: str) -> None:
    """Write what the folder is for, before any work; refuse one in which another run has begun."""
    path = folder / "run.json"
    if path.is_file():
        found, found_base = read_run(path)
        mine, theirs = asdict(config), asdict(found)
        different = [
            f"{k}: {theirs[k]!r} there, {mine[k]!r} here"
            for k in mine
            if k not in NAMES and theirs[k] != mine[k]
        ]
        different += ["the base model"] * (found_base != base_hash)
        if different:
            raise FileError(
                f"{folder}: holds another run ({'; '.join(different)}); choose another folder or delete this one"
            )
    write_file(path, json.dumps({"config": asdict(config), "base_sha256": base_hash}, indent=2) + "\n")


def read_run(path: Path) -> tuple[RunConfig, str]:
    """The configuration in a run's ``run.json``, and the hash of the base that it was made on."""
    try:
        saved = read_json(path)
        return RunConfig(**saved["config"]), str(saved["base_sha256"])
    except (KeyError, TypeError) as error:
        raise FileError(f"{path}: not the configuration of a run ({error})") from None


def estimate_seconds(configs: Sequence[RunConfig]) -> float:
    """Mean seconds of a run in one thread: a step and an evaluation of each task, timed now after compiling
    the kernels."""
    name = configs[0].model
    base, tokenizer = base_of(name).model, base_of(name).tokenizer
    warm_kernels()
    total = 0.0
    for name in {c.task for c in configs}:
        mine = [c for c in configs if c.task == name]
        task, model = (
            make_run_task(mine[0]),
            inject_lora(dequantize_model(base), LoraConfig(), np.random.default_rng(0)),
        )
        batch = task.batch(batch_indices(task.n_train, mine[0].batch_size, 0, 0))
        batches, prompts = task.eval_batches("test"), task.prompts("test")
        with single_blas(), Workers(1) as one:
            step = _seconds(lambda: loss_and_grads(model, batch, one))
            loss = _seconds(lambda: evaluate(model, batches[:1])) * len(batches)
            text = 0.0
            if prompts:
                text = (
                    _seconds(lambda: write(model, prompts[:25], task.max_new_tokens, tokenizer))
                    * len(prompts)
                    / 25
                )
        for c in mine:
            adapter = c.method in ADAPTERS  # also measured as deployed
            texts = (c.split == "test") * (2 + adapter if c.write_all else 1)
            looks = loss * (1 + adapter) + text * texts
            total += looks + step * c.steps * c.gradient_accumulation_steps * (c.method in DEFAULT_RATES)
    return total / len(configs)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def load_run(folder: str | Path) -> tuple[RunConfig, Transformer]:
    """The configuration and the trained model of a folder that :func:`run` has written; raises FileError if
    it is none."""
    folder = Path(folder)
    config, made_on = read_run(folder / "run.json")
    base, base_hash = base_of(config.model).model, base_of(config.model).sha256
    if made_on != base_hash:
        raise FileError(
            f"{folder}: was trained on another base (SHA-256 {made_on[:12]}, here {base_hash[:12]}); train again"
        )
    if config.method in ADAPTERS:
        if not (folder / ADAPTER).is_dir():
            raise FileError(
                f"{folder}: has no adapter yet: its training is not finished; repeat the command that began it"
            )
        if config.init_lora_weights == "loftq":
            model = build(config, base)
            fill_adapter(model, folder / ADAPTER)
            return config, model
        return config, load_adapter(under_adapter(config, base), folder / ADAPTER)[0]
    return config, load_model(folder / "model.safetensors") if config.method in DEFAULT_RATES else build(
        config, base
    )


def environment() -> dict[str, str]:
    """Versions and machine, for every row of results."""
    machine = f"{platform.machine()}, {available_threads()} cores, {cpu_name()}"
    return {
        "python_version": platform.python_version(),
        "numpy_version": np.__version__,
        "numba_version": numba.__version__,
        "minilora_version": minilora.__version__,
        "machine": machine,
    }


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
