"""Text that every Python installation has, and the mixture that the tiny base is pretrained on.

The text is the standard library's source code, split by module into train, validation and test, the
docstrings of the train modules, and the language reference in `pydoc_data.topics`. It differs between Python
versions, so every result carries a SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from minilora.config import ConfigError, require, require_in
from minilora.data.products import HELD_OUT_WORDS, catalogue_documents, definition_sha256
from minilora.data.tokenizer import BOS, EOS

SPLITS = ("train", "validation", "test")
MAX_FILE_BYTES = 200_000
MAX_TRAIN_BYTES = 3_000_000
MAX_EVAL_BYTES = 400_000
_UNLIMITED = 1 << 40

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
    "ensurepip",
    "lib-dynload",
}
_HELD_OUT = re.compile(rf"\b(?:{'|'.join(sorted(HELD_OUT_WORDS))})\b", re.IGNORECASE)


def module_split(name: str) -> str:
    """Return the split of a module: about 80 % train, 10 % validation, 10 % test, by the hash of its name.

    Examples
    --------
    >>> module_split("json.decoder") in SPLITS
    True
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    if bucket < 8:
        return "train"
    return "validation" if bucket == 8 else "test"


@cache
def _module_files() -> tuple[tuple[str, Path], ...]:
    """Return (dotted name, path) of the standard library's modules, ordered by their names' hashes."""
    root = sysconfig.get_path("stdlib")
    found: list[tuple[str, Path]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and name.isidentifier()]
        for file in files:
            stem, suffix = os.path.splitext(file)
            # _sysconfigdata… and sitecustomize describe the machine, not the library.
            describes_machine = stem.startswith(("_sysconfigdata", "sitecustomize"))
            if suffix != ".py" or not stem.isidentifier() or describes_machine:
                continue
            path = Path(folder, file)
            parts = path.relative_to(root).with_suffix("").parts
            if stem == "__init__" and len(parts) > 1:
                parts = parts[:-1]
            found.append((".".join(parts), path))
    if not found:
        raise ConfigError(
            f"standard library: no Python source under {root!r} (a zipped or stripped installation); "
            "use a Python with its library's source, or a text file of your own"
        )
    return tuple(sorted(found, key=lambda item: (hashlib.sha256(item[0].encode()).digest(), item[0])))


@cache
def _read_modules(split: str, max_bytes: int) -> tuple[tuple[str, str], ...]:
    """Return (dotted name, source) of a split's modules, up to `max_bytes`."""
    modules: list[tuple[str, str]] = []
    total = 0
    for name, path in _module_files():
        if module_split(name) != split:
            continue
        try:
            data = path.read_bytes()
            text = data.decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            continue
        if 0 < len(data) <= MAX_FILE_BYTES and total + len(data) <= max_bytes:
            modules.append((name, text))
            total += len(data)
    if not modules:
        raise ConfigError(
            f"standard library: no readable module in the {split} split; use a complete Python installation"
        )
    return tuple(modules)


def python_source(split: str, max_bytes: int | None = None) -> dict[str, str]:
    """Return the source code of the standard library's modules in one split, by dotted name.

    Tests, tools, files above 200 kB and files that are not UTF-8 are left out.

    Parameters
    ----------
    split : {"train", "validation", "test"}
        The split.
    max_bytes : int, optional
        Limit of the sum; by default 3 MB for train, else 0.4 MB. Modules that do not fit are left out, in an
        order that depends on their names only.

    Raises
    ------
    ConfigError
        The split is unknown, or the installation has no source.
    """
    require_in(split, SPLITS, "split")
    if max_bytes is None:
        max_bytes = MAX_TRAIN_BYTES if split == "train" else MAX_EVAL_BYTES
    return dict(_read_modules(split, max_bytes))


def _without_held_out(text: str) -> str:
    """Drop the paragraphs with a held-out product word, so pretraining never shows one."""
    if not _HELD_OUT.search(text):
        return text
    return "\n\n".join(part for part in text.split("\n\n") if not _HELD_OUT.search(part))


def docstrings(source: str, name: str = "module") -> str:
    r"""Return the docstrings of a module, its classes and functions as one text, each after its name.

    Examples
    --------
    >>> print(docstrings('"Adds."\ndef add(a, b):\n    "Return the sum of a and b."\n', "sums"))
    sums: Adds.
    <BLANKLINE>
    add: Return the sum of a and b.
    """
    import ast  # takes 10 ms, which only pretraining pays

    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
        return ""
    found: dict[str, None] = {}  # an ordered set
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found[f"{getattr(node, 'name', name)}: {text}"] = None
    return "\n\n".join(found)


@cache
def _standard_documents() -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(
            "pydoc_data.topics is missing from this Python; use a complete installation"
        ) from error
    texts = [topics[key] for key in sorted(topics)]
    texts += [docstrings(source, name) for name, source in python_source("train", _UNLIMITED).items()]
    cleaned = (_without_held_out(text).strip() for text in texts)
    return tuple(text for text in cleaned if len(text) >= 40)


def real_documents(text_path: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Return the real text for pretraining; paragraphs with a held-out product word are left out.

    Parameters
    ----------
    text_path : path, optional
        A text file. It is cut at blank lines into pieces of about 4 kB, without its last 20 %, which are the
        `text` task's validation and test. By default: the language reference and the docstrings of the train
        modules.

    Raises
    ------
    ConfigError
        The installation has no source, or the file cannot be used (`read_text`).
    """
    if text_path is None:
        return _standard_documents()
    text = read_text(text_path)
    train = text.encode()[: len(text.encode()) * 8 // 10].decode(errors="ignore")
    pieces = [[""]]
    size = 0
    for paragraph in _without_held_out(train).split("\n\n"):
        if size > 4000:
            pieces.append([])
            size = 0
        pieces[-1].append(paragraph)
        size += len(paragraph)
    documents = ("\n\n".join(piece).strip() for piece in pieces)
    return tuple(document for document in documents if document)


def read_text(path: str | os.PathLike[str], min_bytes: int = 1) -> str:
    """Return the text of a UTF-8 file.

    Raises
    ------
    ConfigError
        The file is missing, empty, not UTF-8 or shorter than `min_bytes`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"text file {os.fspath(path)!r}: {error.strerror or error}; give the path of a text file"
        ) from error
    if not data.strip():
        raise ConfigError(
            f"text file {os.fspath(path)!r} is empty; give a file with at least {min_bytes} bytes"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"text file {os.fspath(path)!r} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            "convert it, for example with `iconv -t utf-8`"
        ) from error
    if len(data) < min_bytes:
        raise ConfigError(
            f"text file {os.fspath(path)!r} has {len(data)} bytes: at least {min_bytes} are needed; give a "
            "longer one"
        )
    return text


def token_stream(texts: Iterable[str]) -> np.ndarray:
    """Return BOS text EOS BOS text EOS … as one uint16 array.

    Examples
    --------
    >>> token_stream(["ab", "c"]).tolist()
    [256, 97, 98, 257, 256, 99, 257]
    """
    bos, eos = np.array([BOS], np.uint16), np.array([EOS], np.uint16)
    parts = [np.zeros(0, np.uint16)]
    for text in texts:
        parts += [bos, np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16), eos]
    return np.concatenate(parts)


def _catalogue_rows(seed: int, n_rows: int, window: int) -> np.ndarray:
    """Return rows (n_rows, window) that each begin with a document, so a card stands beside its blurb."""
    documents = catalogue_documents(seed)
    rows = np.empty((n_rows, window), np.uint16)
    for row in rows:
        tokens = bytearray()
        marks: list[tuple[int, int]] = []
        while len(tokens) < window:
            marks.append((len(tokens), BOS))
            tokens += b"\0" + next(documents).encode() + b"\0"
            marks.append((len(tokens) - 1, EOS))
        row[:] = np.frombuffer(bytes(tokens[:window]), np.uint8)
        for position, special in marks:
            if position < window:
                row[position] = special
    return rows


def pretraining_tokens(
    seed: int,
    n_tokens: int = 8_000_000,
    *,
    window: int = 209,
    catalogue_share: float = 0.5,
    text_path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Return the tokens for pretraining: a whole number of rows of `window` tokens, in random order.

    Catalogue rows begin with a document, and no document is repeated. The other rows are consecutive cuts of
    the real documents, which are shuffled anew for each pass. Read by rows, `tokens.reshape(-1, window)`, no
    card is separated from its blurb.

    Parameters
    ----------
    seed : int
        Decides documents and order.
    n_tokens : int
        Upper limit of the length.
    window : int
        Tokens per row.
    catalogue_share : float
        Share of catalogue rows, 0 to 1.
    text_path : path, optional
        Source of the real documents (`real_documents`).

    Returns
    -------
    ndarray of uint16, (n_rows · window,)
        The tokens.

    Raises
    ------
    ConfigError
        A size or the share is out of range, or there is no usable real text.
    """
    require(window >= 2, "window", window, "must be at least 2")
    require(n_tokens >= window, "n_tokens", n_tokens, f"must be at least window, which is {window}")
    require(0.0 <= catalogue_share <= 1.0, "catalogue_share", catalogue_share, "must be from 0 to 1")
    rng = random.Random(seed)
    n_rows = n_tokens // window
    n_catalogue = round(catalogue_share * n_rows)
    parts: list[np.ndarray] = []
    missing = (n_rows - n_catalogue) * window
    documents = list(real_documents(text_path)) if missing else []
    while missing > 0:
        rng.shuffle(documents)
        parts.append(token_stream(documents)[:missing])
        missing -= len(parts[-1])
    real = np.concatenate(parts).reshape(-1, window) if parts else np.empty((0, window), np.uint16)
    rows = np.concatenate([_catalogue_rows(rng.getrandbits(63), n_catalogue, window), real])
    order = list(range(n_rows))
    rng.shuffle(order)
    return rows[order].reshape(-1)


def corpus_sha256(text_path: str | os.PathLike[str] | None = None) -> str:
    """Return the SHA-256 of the pretraining corpus: the real documents and the catalogue's definition."""
    digest = hashlib.sha256(definition_sha256().encode())
    for document in real_documents(text_path):
        digest.update(len(document).to_bytes(8, "big") + document.encode("utf-8"))
    return digest.hexdigest()
