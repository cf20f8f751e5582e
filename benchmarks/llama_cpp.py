"""A GGUF in llama.cpp and in minilora: `python -m benchmarks.llama_cpp MODEL.gguf [--against ORIGINAL.gguf]`.

Both sides get the same token ids. The page compares greedy continuations and the perplexity of a fixed text;
`ABOUT` says how.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy.special import log_softmax

from benchmarks import workload
from benchmarks.timing import timed
from minilora.data.tasks import ProductsTask
from minilora.data.text import TextTokenizer
from minilora.formats.files import FileError, write_file
from minilora.formats.gguf import GGUFFile
from minilora.formats.llama_gguf import load_gguf, save_gguf
from minilora.generation import generate
from minilora.quant.blocks import BlockWeight
from minilora.quant.model import dequantize_model
from minilora.tables import markdown_table
from minilora.transformer import Transformer

Array = np.ndarray
ABOUT = (
    "Both sides get the same token ids: greedy continuations and the perplexity of a fixed text. The "
    "tokenizers are compared apart. llama.cpp rounds activations to 8 bits before it multiplies them by "
    "Q4_1, Q4_0 or Q8_0, which moves SmolLM2's logits by one to four hundredths of their range. So each "
    "file is also written as F32, with the same numbers, and compared in that form: what is left there is "
    "float32's rounding."
)
INSTALL = (
    "llama-cpp-python is not installed: pip install llama-cpp-python (it compiles llama.cpp, which takes a "
    "C++ compiler and minutes)"
)
TEXT_TOKENS = 512
VARIED = (
    "The capital of France is",
    "don't  DO\tthat\n\n  twice ",
    "naïve café — 日本語, Ελληνικά, عربى 🙂",
    "x=3.14159; y[0]+=1e-5  # 1234567",
    "<|im_start|>user\nHi<|im_end|>\n",
)


class LlamaCpp:
    """llama.cpp on a file.

    With `scores` it keeps the logits of every token, and keys and values as float32 instead of float16.
    """

    def __init__(self, path: str, threads: int = 2, context: int = 1024, scores: bool = False):
        import llama_cpp

        kv: dict[str, Any] = (
            {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if scores else {}
        )
        self.model = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=scores,
            verbose=False,
            **kv,
        )
        self.works: dict[str, Callable[[], Any]] = {}

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens are recognized, nothing is added."""
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: Array) -> Array:
        """Return logits (T, V) after each token."""
        self.model.reset()
        self.model.eval(ids.tolist())
        return np.array(self.model.scores[: len(ids)])

    def write(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Return greedy continuations, made one after another, that do not stop early."""
        return [self._write(prompt, tokens) for prompt in prompts]

    def _write(self, prompt: list[int], tokens: int) -> list[int]:
        self.model.reset()
        found: list[int] = []
        for token in self.model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == tokens:
                break
        return found

    def prepare_writing(self, label: str, prompts: list[list[int]], tokens: int) -> None:
        """Prepare the work `label`: greedy text."""
        self.works[label] = partial(self.write, prompts, tokens)

    def timed(self, label: str, n: int) -> float:
        """Return the seconds of one call of a prepared work, from n in a row."""
        return timed(self.works[label], n)

    def result(self, label: str) -> Any:
        """Return what a prepared work returns."""
        return self.works[label]()


@dataclass(frozen=True)
class Options:
    """Compare llama.cpp with minilora on a GGUF file, and a tuned file with its original."""

    model: Annotated[str, tyro.conf.Positional]
    """The GGUF file, for example a merged one."""
    against: str | None = None
    """The file that it was made from."""
    new_tokens: int = 48
    """Length of each continuation."""
    prompts: int = 4
    """Held-out products to describe, beside two other questions."""
    threads: int = 2
    out: str = "benchmarks/results/llama_cpp"


def compare(path: Path, options: Options) -> list[dict[str, Any]]:
    """Compare one file on both sides, as it is and as F32."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / f"{path.stem} as F32.gguf"
        save_gguf(dequantize_model(load_gguf(path)), dense, like=path, quant_type="F32")
        return [_compare(file, options) for file in (path, dense)]


def _compare(path: Path, options: Options) -> dict[str, Any]:
    file = GGUFFile(path)
    model, tokenizer = load_gguf(file), TextTokenizer.from_gguf(file.metadata)
    theirs = LlamaCpp(str(path), options.threads, scores=True)
    ids = np.array(tokenizer.encode(workload.real_text()))[: min(TEXT_TOKENS, model.config.context_length)]
    texts = [*VARIED, workload.real_text()]
    found = [tokenizer.encode(text, add_special=False) == theirs.encode(text) for text in texts]
    return {
        "file": path.stem,
        "bytes": path.stat().st_size,
        "tokenizer_equal": sum(found),
        "tokenizer_texts": len(found),
        **forced(model.logits(ids[None])[0], theirs.logits(ids), ids),
        "continuations": _continuations(model, tokenizer, theirs, options),
    }


def forced(mine: Array, theirs: Array, ids: Array) -> dict[str, float]:
    """Compare the logits (T, V) of both sides along one text (T,).

    The result has both perplexities, the largest difference of logits relative to their range, and the share
    of equal likeliest tokens.

    >>> logits = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    >>> forced(logits, logits, np.array([0, 1]))["perplexity"]
    4.0
    """
    perplexity, theirs_perplexity = (_perplexity(logits, ids) for logits in (mine, theirs))
    return {
        "tokens": len(ids),
        "perplexity": perplexity,
        "llama_cpp_perplexity": theirs_perplexity,
        "perplexity_differs_by": abs(perplexity / theirs_perplexity - 1),
        "logits_differ_by": float(np.abs(mine - theirs).max() / np.ptp(mine)),
        "same_likeliest": float(np.mean(mine.argmax(-1) == theirs.argmax(-1))),
    }


def _perplexity(logits: Array, ids: Array) -> float:
    """Return exp of the mean of −log p(next token)."""
    log_p = log_softmax(logits[:-1].astype(np.float64), axis=-1)
    chosen = log_p[np.arange(len(log_p)), ids[1:]]
    return round(float(np.exp(-chosen.mean())), 12)


def _continuations(
    model: Transformer, tokenizer: TextTokenizer, theirs: LlamaCpp, options: Options
) -> list[dict[str, Any]]:
    prompts = [product.prompt() for product in ProductsTask(n_eval=options.prompts).evaluation("test")[0]]
    prompts += ["What is the capital of France?", "Write one sentence about the sea."]
    ids = [tokenizer.chat([{"role": "user", "content": text}]) for text in prompts]
    mine, other = generate(model, ids, options.new_tokens), theirs.write(ids, options.new_tokens)
    rows = []
    for prompt, a, b in zip(prompts, mine, other, strict=True):
        # what a user sees: up to the first stop token
        until = min((i + 1 for i, token in enumerate(a) if token in tokenizer.stop_ids), default=len(a))
        rows.append(
            {
                "prompt": prompt,
                **agreement(a[:until], b[:until]),
                "ours": tokenizer.decode(a[:until]),
                "llama_cpp": tokenizer.decode(b[:until]),
            }
        )
    return rows


def agreement(a: list[int], b: list[int]) -> dict[str, Any]:
    """Return the number of tokens, how many are equal at their place, and the place of the first difference.

    >>> agreement([1, 2, 3, 4], [1, 2, 5, 4])
    {'tokens': 4, 'equal': 3, 'first_difference': 2}
    """
    same = [x == y for x, y in zip(a, b, strict=True)]
    return {
        "tokens": len(same),
        "equal": sum(same),
        "first_difference": same.index(False) if False in same else None,
    }


def changes(path: Path, original: Path) -> dict[str, int]:
    """Count the tensors of a tuned file by how they differ from the original's.

    They are identical, differ in minima alone (codes and scales are equal bit by bit), or differ in more.

    Raises
    ------
    FileError
        One file has a tensor that the other lacks.
    """
    new, old = GGUFFile(path), GGUFFile(original)
    if new.tensors.keys() != old.tensors.keys():
        some = sorted(new.tensors.keys() ^ old.tensors.keys())[:3]
        raise FileError(f"{path}: not made from {original}: only one of them has {', '.join(some)}")
    counts = {"identical": 0, "other minima": 0, "other": 0}
    for name, info in new.tensors.items():
        counts[_change(new, old, name) if info.type == old.tensors[name].type else "other"] += 1
    return counts


def _change(new: GGUFFile, old: GGUFFile, name: str) -> str:
    if len(new.tensors[name].shape) != 2:
        return "identical" if np.array_equal(new.array(name), old.array(name)) else "other"
    a, b = new.weight(name), old.weight(name)
    if not (isinstance(a, BlockWeight) and isinstance(b, BlockWeight)):
        return "identical" if np.array_equal(a.dense(), b.dense()) else "other"
    if np.array_equal(a.blocks, b.blocks):
        return "identical"
    same = np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)
    return "other minima" if same else "other"


def page(results: dict[str, Any]) -> str:
    """Return the comparison as Markdown."""
    head = [
        "file",
        "MB",
        "tokenizers agree",
        "perplexity, ours",
        "llama.cpp",
        "difference",
        "logits differ by",
        "same likeliest token",
        "continuations equal",
        "their tokens equal",
    ]
    body = []
    for row in results["files"]:
        rows = row["continuations"]
        body.append(
            [
                row["file"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['tokenizer_equal']} of {row['tokenizer_texts']} texts",
                f"{row['perplexity']:.4f}",
                f"{row['llama_cpp_perplexity']:.4f}",
                f"{row['perplexity_differs_by']:.1e}",
                f"{row['logits_differ_by']:.1e}",
                f"{100 * row['same_likeliest']:.1f} %",
                f"{sum(r['first_difference'] is None for r in rows)} of {len(rows)}",
                f"{sum(r['equal'] for r in rows)} of {sum(r['tokens'] for r in rows)}",
            ]
        )
    parts = [
        f"# {results['files'][0]['file']} in llama.cpp and in minilora",
        f"`{results['command']}`, llama-cpp-python {results['llama_cpp_python']}. {ABOUT}",
        markdown_table(head, body),
    ]
    if results["changes"]:
        said = ", ".join(f"{n} {kind}" for kind, n in results["changes"].items())
        parts.append(
            f"Tensors beside the original's: {said}. Other minima: codes and scales are equal bit by bit."
        )
    for row in results["files"]:
        if row["file"].endswith(" as F32") and all(
            r["first_difference"] is None for r in row["continuations"]
        ):
            continue  # minilora's texts again
        parts.append(f"## Continuations by {row['file']}")
        for r in row["continuations"]:
            where, other = "", "the same"
            if r["first_difference"] is not None:
                where, other = f" (differs from token {r['first_difference']} on)", r["llama_cpp"]
            prompt = " / ".join(r["prompt"].split("\n")).strip(" /")
            written = f"- minilora: {_one_line(r['ours'])}\n- llama.cpp{where}: {_one_line(other)}"
            parts.append(f"**{prompt}**\n\n{written}")
    return "\n\n".join(parts) + "\n"


def _one_line(text: str) -> str:
    return " ⏎ ".join(text.strip().split("\n"))


def main(options: Options, command: str) -> int:
    """Compare, print the table and write both files.

    Returns 2 if llama-cpp-python is missing or a file cannot be read.
    """
    if find_spec("llama_cpp") is None:
        print(INSTALL, file=sys.stderr)
        return 2
    try:
        path, original = Path(options.model), options.against and Path(options.against)
        changed = changes(path, original) if original else None
        rows = [row for file in ([path, original] if original else [path]) for row in compare(file, options)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results = {
        "command": command,
        "llama_cpp_python": version("llama-cpp-python"),
        "changes": changed,
        "files": rows,
    }
    text = page(results)
    contents = {".json": json.dumps(results, indent=1) + "\n", ".md": text}
    files = [
        write_file(Path(options.out) / f"{path.stem}{suffix}", content)
        for suffix, content in contents.items()
    ]
    print("\n".join([text, *map(str, files)]))
    return 0


if __name__ == "__main__":
    chosen = tyro.cli(Options, prog="python -m benchmarks.llama_cpp")
    named = [Path(a).name if a.endswith(".gguf") else a for a in sys.argv[1:]]
    sys.exit(main(chosen, " ".join(["python -m benchmarks.llama_cpp", *named])))
