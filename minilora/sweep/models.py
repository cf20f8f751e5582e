"""Models with adapters by name: opened for generating, or merged and written for other programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapter import Adapter
from minilora.config import TINY, ConfigError, require
from minilora.data.tokenizer import Tokenizer
from minilora.formats.bases import Pretrained, save_tokenizer
from minilora.formats.checkpoint import save_model
from minilora.formats.files import FileError, writable_folder
from minilora.formats.huggingface import save_huggingface
from minilora.formats.llama_gguf import WRITABLE_TYPES, load_gguf, save_gguf
from minilora.formats.peft import load_adapter
from minilora.generation import generate, stream
from minilora.memory import format_bytes
from minilora.merging import MergeError, merge, merge_errors
from minilora.quant.blocks import GGUF_BLOCK
from minilora.quant.model import dequantize_model
from minilora.sweep.inputs import base_of
from minilora.sweep.run_models import under_adapter
from minilora.sweep.saved_runs import ADAPTER, load_run, read_run
from minilora.sweep.settings import RunConfig
from minilora.transformer import Transformer


@dataclass(frozen=True)
class Opened:
    """A model to use: the base it stands on, and the run that trained it, if one is known."""

    base: Pretrained
    model: Transformer
    run: RunConfig | None = None


def open_model(name: str = TINY, adapter: str | Path | None = None, run: str | Path | None = None) -> Opened:
    """Open a base by name, with or without an adapter over it, or a folder that `minilora train` wrote.

    Parameters
    ----------
    name
        tiny, smollm2, a .gguf file, a Hugging Face folder or a .safetensors file of ours.
    adapter
        Folder of an adapter. One in a run's folder stands on that run's base (NF4 for QLoRA), any other on
        the base as it is stored.
    run
        Folder of a run, which knows its model and adapter.

    Raises
    ------
    FileError
        The adapter belongs to another model, or does not fit this one.
    """
    if run is not None:
        if adapter is not None or name != TINY:
            raise ConfigError(
                f"run={str(run)!r}: knows its model and adapter; leave out --model and --adapter"
            )
        config, model = load_run(run)
        return Opened(base_of(config.model), model, config)
    base = base_of(name)
    if adapter is None:
        return Opened(base, base.model)
    folder = Path(adapter)
    if not (folder / "adapter_config.json").exists() and (folder / ADAPTER).is_dir():
        folder = folder / ADAPTER
    settings = folder.resolve().parent / "run.json"
    known = None
    if settings.is_file():
        known, made_on = read_run(settings)
        if made_on != base.sha256:
            raise FileError(
                f"{folder}: was trained on model {known.model!r} (SHA-256 {made_on[:12]}), not on {name!r} "
                f"({base.sha256[:12]}); give --model {known.model}"
            )
    stands_on = base.model if known is None else under_adapter(known, base.model)
    return Opened(base, load_adapter(stands_on, folder)[0], known)


def write_streaming(
    opened: Opened, prompt: Sequence[int], max_new_tokens: int, **sampling: Any
) -> Iterator[str]:
    """Continue one prompt and yield its text in whole characters; bad input is refused at the call."""
    tokenizer: Tokenizer = opened.base.tokenizer
    tokens = stream(opened.model, prompt, max_new_tokens, eos=tokenizer.stop_ids, **sampling)

    def texts() -> Iterator[str]:
        pieces = tokenizer.stream()
        for token in tokens:
            if text := pieces.push(token):
                yield text
        if text := pieces.flush():
            yield text

    return texts()


def write_batch(
    opened: Opened, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling: Any
) -> list[str]:
    """Continue several prompts as one batch and return their texts."""
    tokenizer: Tokenizer = opened.base.tokenizer
    return [
        tokenizer.decode(ids)
        for ids in generate(opened.model, prompts, max_new_tokens, eos=tokenizer.stop_ids, **sampling)
    ]


def export(opened: Opened, out: str | Path, quant_type: str | None = None) -> list[str]:
    """Merge the adapter into the base, write a file or folder, and return what to say about it.

    Parameters
    ----------
    opened
        A model with an adapter.
    out
        X.gguf (only from a GGUF base), X.safetensors (our own file, where QA-LoRA's offsets stay float32), or
        a Hugging Face folder with dense weights.
    quant_type
        Type of the matrices of an X.gguf; default: F16. A QA-LoRA adapter goes into the minima of Q4_1
        instead. Its codes stay bit for bit, and its minima are rounded to float16.
    """
    out, model = Path(out), opened.model
    adapted = [linear for _, linear in model.linears() if isinstance(linear, Adapter)]
    method = "" if opened.run is None else f" (method {opened.run.method!r})"
    require(
        bool(adapted),
        "adapter",
        None,
        f"nothing to merge in this model{method}; give --adapter FOLDER or the --run of one",
    )
    require(
        out.suffix in ("", ".gguf", ".safetensors"), "out", str(out), "give X.gguf, X.safetensors or a folder"
    )
    writable_folder(out.parent)
    if out.suffix == ".gguf":
        return _export_gguf(opened, out, quant_type, all(as_q4_1(linear) for linear in adapted))
    require(quant_type is None, "quant_type", quant_type, "with --model only an X.gguf takes it")
    if out.suffix == ".safetensors":
        require(
            opened.base.name == TINY or opened.base.path.suffix == ".safetensors",
            "out",
            str(out),
            "holds no tokenizer; write an X.gguf or a Hugging Face folder",
        )
        merged, errors = merge(model, "offsets" if all(linear.pool > 1 for linear in adapted) else "dense")
        save_model(merged, out)
        return [_worst(errors), f"written to {out}"]
    merged, errors = merge(model, "dense")
    save_huggingface(dequantize_model(merged), out)
    save_tokenizer(opened.base, out)
    return [_worst(errors), f"written to {out}, dense in float32"]


def as_q4_1(linear: Adapter) -> bool:
    """Return whether an adapter merges into GGUF's Q4_1: it pools over groups of 32 of 4-bit codes."""
    weight: Any = linear.base.weight
    return linear.pool == GGUF_BLOCK and weight.offset_group == GGUF_BLOCK and weight.bits == 4


def _export_gguf(opened: Opened, out: Path, quant_type: str | None, pooled: bool) -> list[str]:
    like = opened.base.path
    if like.suffix != ".gguf":
        raise ConfigError(
            f"out={str(out)!r}: a GGUF takes its tokenizer and metadata from the GGUF of its base, and "
            f"{like} is none; write a .safetensors file or a folder"
        )
    if out.exists() and out.samefile(like):
        raise ConfigError(f"out={str(out)!r}: is the base itself; give another name")
    if quant_type is not None:
        require(
            quant_type in WRITABLE_TYPES,
            "quant_type",
            quant_type,
            f"a GGUF is written as {', '.join(WRITABLE_TYPES)}",
        )
        require(
            not pooled,
            "quant_type",
            quant_type,
            "a QA-LoRA adapter goes into the base's Q4_1 as it is; leave it out",
        )
    merged, errors = merge(opened.model, "offsets" if pooled else "dense")
    changes = save_gguf(merged, out, like, quant_type)
    written = load_gguf(out)
    said = [_worst(errors)]
    if pooled:
        most, error = max(changes.values()), _worst(merge_errors(opened.model, written), "the file")
        said.append(
            f"{len(changes)} tensors Q4_1, every code and scale as it was; minima rounded to float16, which "
            f"changes a weight by {most:.1e} at most: {error}"
        )
    else:
        said.append(_worst(merge_errors(opened.model, written), f"the file in {quant_type or 'F16'}"))
    ids = np.array([opened.base.tokenizer.encode(SAMPLE)])
    said.append(
        "logits of a text, file beside exact merge: "
        + _compare(written.logits(ids)[0], merged.logits(ids)[0])
    )
    return [
        *said,
        f"written to {out}, {format_bytes(out.stat().st_size)} ({format_bytes(like.stat().st_size)} before)",
    ]


SAMPLE = (
    "The lighthouse keeper counted 17 ships that morning. Two of them carried oranges, one carried letters, "
    "and the others, as far as anyone could tell, carried nothing but the wind. "
    '"What do they want here?" asked his daughter.'
)
"""Text on which a written file is compared with the model."""


def _compare(logits: np.ndarray, exact: np.ndarray) -> str:
    from scipy.special import log_softmax  # takes a third of a second to import, and `generate` needs none

    p, q = (log_softmax(z.astype(np.float64), axis=-1) for z in (exact, logits))
    kl = float((np.exp(p) * (p - q)).sum(axis=-1).mean())
    largest = float(np.abs(logits - exact).max())
    share = largest / float(np.ptp(exact))
    difference = f"largest difference {largest:.1e} ({share:.1e} of their range)"
    return f"{difference}, KL {max(kl, 0.0):.1e} nats per token"


def _worst(errors: dict[str, MergeError], what: str = "merged") -> str:
    worst = max(errors, key=lambda name: errors[name].relative)
    rms = float(np.sqrt(np.mean([error.relative**2 for error in errors.values()])))
    return (
        f"{what}: {len(errors)} layers, error relative to ΔW {rms:.2e} (root mean square over layers), at "
        f"most {errors[worst].relative:.2e} in {worst}"
    )
