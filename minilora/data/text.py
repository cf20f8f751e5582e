"""A language model's tokenizer, from a GGUF or a Hugging Face folder, with the `tokenizers` library.

Byte-level BPE: a pre-tokenizer cuts the text into words. Each word's bytes are spelled in 256 visible
characters (a space is Ġ). Merges join them, in the order in which they were learnt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minilora.config import ConfigError
from minilora.data.chat import INSTALL, ChatTemplate
from minilora.data.tokenizer import Messages, TextStream, check_ids

CONTROL, USER_DEFINED = 3, 4
"""GGUF's types of tokens that are found in a text before it is cut into words; control tokens are special."""

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
)
"""Control tokens that end generation, besides the file's own end tokens."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = ""  # ByteLevel's own expression

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt2": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),  # digits first, one by one: "a  12" is a, two spaces, 1, 2
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
"""`tokenizer.ggml.pre` → the expressions that cut a text into words, one after the other."""


class TextTokenizer:
    """A `minilora.data.tokenizer.Tokenizer` with a model's special tokens and chat template.

    Make one with `from_gguf` or `from_folder`.

    Attributes
    ----------
    vocab_size : int
        Number of ids.
    bos_id : int or None
        The token that begins a document, if there is one.
    eos_id : int
        The token that ends a document or a turn.
    pad_id : int
        The id that fills short rows.
    stop_ids : frozenset of int
        The tokens that end generation.
    begin, end : tuple of int
        The tokens that `encode` puts before and after a text.
    backend : tokenizers.Tokenizer
        The library's tokenizer.
    template : ChatTemplate or None
        The chat template, if the model has one; `has_template` says so.
    """

    def __init__(
        self,
        backend: Any,
        *,
        where: str,
        special: Mapping[str, int | None],
        add_bos: bool,
        add_eos: bool,
        stops: Iterable[int],
        template: str | None,
        sha256: str,
    ) -> None:
        self.backend, self.where, self.sha256 = backend, where, sha256
        self.vocab_size: int = backend.get_vocab_size()
        eos = special.get("eos")
        if eos is None:
            raise ConfigError(
                f"{where}: no end-of-text token (eos_token_id): generation would never end; name one there"
            )
        self.bos_id, self.eos_id = special.get("bos"), eos
        self.pad_id = next(i for i in (special.get("pad"), special.get("unk"), eos) if i is not None)
        self.begin: tuple[int, ...] = ()
        if add_bos:
            if self.bos_id is None:
                raise ConfigError(f"{where}: add_bos_token=True: needs a bos_token_id")
            self.begin = (self.bos_id,)
        self.end = (eos,) if add_eos else ()
        added = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.stop_ids = frozenset({eos, *stops, *(added[name] for name in END_OF_TURN if name in added)})
        names = {f"{name}_token": backend.id_to_token(i) for name, i in special.items() if i is not None}
        self.template = ChatTemplate(template, where, names) if template is not None else None
        self.has_template = self.template is not None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str = "GGUF") -> TextTokenizer:
        """Make the tokenizer of a GGUF.

        Parameters
        ----------
        metadata : mapping
            `formats.gguf.GGUFFile(path).metadata`; only `tokenizer.ggml.*` and `tokenizer.chat_template` are
            read.
        where : str
            The file, for messages.

        Raises
        ------
        ImportError
            tokenizers is not installed.
        ConfigError
            It is no byte-level BPE, the pre-tokenizer is unknown, or keys are missing or contradict one
            another. The message names the key.
        """
        tokenizers = _library()
        read = _Metadata(metadata, where)
        kind, pre = read.text("ggml.model"), read.text("ggml.pre", "default")
        if kind != "gpt2":
            raise read.error(
                "ggml.model",
                f"is {kind!r}; byte-level BPE ('gpt2') is read: a Hugging Face folder with "
                "tokenizer.json works for every kind",
            )
        if pre not in PRE_TOKENIZERS:
            raise read.error(
                "ggml.pre", f"is {pre!r}; known are {', '.join(PRE_TOKENIZERS)}: use the Hugging Face folder"
            )
        tokens, merges = read.strings("ggml.tokens"), read.strings("ggml.merges")
        types = read.types(len(tokens))
        vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(vocabulary) < len(tokens):
            twice = next(i for i, token in enumerate(tokens) if vocabulary[token] != i)
            raise read.error(
                "ggml.tokens", f"has {tokens[twice]!r:.80} twice, at {twice} and {vocabulary[tokens[twice]]}"
            )
        is_llama = PRE_TOKENIZERS[pre] == (_LLAMA3,)
        pairs = [tuple(merge.split(" ")) for merge in merges]
        try:  # a dict and tuples take a quarter of the time of tokenizer.json
            model = tokenizers.models.BPE(vocabulary, pairs, ignore_merges=is_llama)
        except Exception as error:
            raise read.bad_merge(pairs, vocabulary, error) from None
        backend = tokenizers.Tokenizer(model)
        if PRE_TOKENIZERS[pre] == (_QWEN2,):
            backend.normalizer = tokenizers.normalizers.NFC()
        backend.pre_tokenizer = _pre_tokenizer(PRE_TOKENIZERS[pre])
        backend.decoder = tokenizers.decoders.ByteLevel()
        for special, add in ((True, backend.add_special_tokens), (False, backend.add_tokens)):
            wanted = CONTROL if special else USER_DEFINED
            chosen = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted and token]
            add([tokenizers.AddedToken(token, normalized=False, special=special) for token in chosen])
        ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        special_ids = {name: read.token_id(f"ggml.{key}_token_id", len(tokens)) for name, key in ids.items()}
        ends = [read.token_id(f"ggml.{key}_token_id", len(tokens)) for key in ("eot", "eom")]
        template = read.text("chat_template", "") or None
        add_bos, add_eos = read.flag("ggml.add_bos_token", is_llama), read.flag("ggml.add_eos_token", False)
        definition = [
            pre,
            *tokens,
            *merges,
            str(types),
            str(special_ids),
            str((add_bos, add_eos)),
            template or "",
        ]
        sha256 = hashlib.sha256("\0".join(definition).encode("utf-8", "surrogatepass")).hexdigest()
        return cls(
            backend,
            where=where,
            special=special_ids,
            add_bos=add_bos,
            add_eos=add_eos,
            stops=[i for i in ends if i is not None],
            template=template,
            sha256=sha256,
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> TextTokenizer:
        """Make the tokenizer of a Hugging Face folder with `tokenizer.json`.

        Special tokens and the chat template come from tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json and chat_template.jinja, where these exist.

        Raises
        ------
        ImportError
            tokenizers is not installed.
        ConfigError
            There is no tokenizer.json, or a file cannot be read. The message names it.
        """
        tokenizers = _library()
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            hint = ""
            if (folder / "tokenizer.model").is_file():
                hint = (
                    "; a SentencePiece tokenizer.model alone is not read: save the folder again with "
                    "transformers' fast tokenizer"
                )
            raise ConfigError(f"{path}: no such file{hint}")
        try:
            raw = path.read_bytes()
            backend = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:
            raise ConfigError(
                f"{path}: not a tokenizer that can be read ({str(error)[:200]}); fetch a fresh copy"
            ) from None
        backend.no_truncation()
        backend.no_padding()
        config = _json_object(folder / "tokenizer_config.json")
        special_map = _json_object(folder / "special_tokens_map.json")
        generation = _json_object(folder / "generation_config.json")
        model = _json_object(folder / "config.json")
        special: dict[str, int | None] = {}
        for name in ("bos", "eos", "unk", "pad"):
            token = config.get(f"{name}_token") or special_map.get(f"{name}_token")
            if isinstance(token, dict):
                token = token.get("content")
            special[name] = backend.token_to_id(token) if isinstance(token, str) else None
            if isinstance(token, str) and special[name] is None:
                raise ConfigError(
                    f"{folder}: {name}_token is {token!r:.80}, which tokenizer.json does not have"
                )
        ends = {
            *_token_ids(generation, "eos_token_id", folder, backend),
            *_token_ids(model, "eos_token_id", folder, backend),
        }
        if special["eos"] is None and ends:
            special["eos"] = min(ends)
        # tokenizer_config.json decides; without it, whether tokenizer.json adds the token to a text
        add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
        plain = backend.encode("a", add_special_tokens=False).ids
        whole = backend.encode("a", add_special_tokens=True).ids
        adds = len(whole) > len(plain)
        if add_bos is None:
            add_bos = adds and special["bos"] is not None and whole[0] == special["bos"]
        if add_eos is None:
            add_eos = adds and special["eos"] is not None and whole[-1] == special["eos"]
        template = _folder_template(folder, config)
        sha256 = hashlib.sha256(
            b"\0".join([raw, repr((special, add_bos, add_eos, template)).encode()])
        ).hexdigest()
        return cls(
            backend,
            where=str(folder),
            special=special,
            add_bos=bool(add_bos),
            add_eos=bool(add_eos),
            stops=ends,
            template=template,
            sha256=sha256,
        )

    def files(self) -> dict[str, str]:
        """Return the texts of `tokenizer.json` and `tokenizer_config.json`, by file name."""
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        settings |= {name: self.backend.id_to_token(i) for name, i in named.items() if i is not None}
        if self.template is not None:
            settings["chat_template"] = self.template.source
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer.json": self.backend.to_str(pretty=True), "tokenizer_config.json": text}

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the ids of a text; a special token spelled in it becomes that token.

        Parameters
        ----------
        text : str
            Any text.
        add_special : bool
            Put BOS before and EOS after the text, as the model expects.

        Raises
        ------
        ConfigError
            The text is no string, or holds half a surrogate pair.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise ConfigError(
                f"text={text!r:.80}: must be a string of whole characters (no lone surrogates)"
            ) from None
        return [*self.begin, *ids, *self.end] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids; broken UTF-8 becomes U+FFFD.

        Raises
        ------
        ConfigError
            An id is outside 0..vocab_size-1.
        """
        numbers = [int(i) for i in ids]
        check_ids(numbers, self.vocab_size)
        return str(self.backend.decode(numbers, skip_special_tokens=skip_special))

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, by the model's chat template.

        Raises
        ------
        ConfigError
            There is no template, `messages` is no conversation, or the template raises or does not end.
        ImportError
            jinja2 is not installed.
        """
        if self.template is None:
            raise ConfigError(
                f"{self.where}: no chat template; give raw text (--prompt, or JSONL with prompt and "
                "completion)"
            )
        return self.template.render(messages, add_generation_prompt)

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation; by default the assistant speaks next."""
        return self.encode(self.render(messages, add_generation_prompt), add_special=False)

    def stream(self) -> TextStream:
        """Return a decoder for ids that come one by one."""
        return TextStream(self.decode, self._byte_ids.__contains__)

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        """Ids of `<0x00>` to `<0xFF>`, SentencePiece's spelling of bytes; a run of them is decoded as one."""
        found = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in found if i is not None)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            f"the tokenizer of a language model needs the tokenizers library: {INSTALL}"
        ) from None
    return tokenizers


def _pre_tokenizer(expressions: Sequence[str]) -> Any:
    """Return the pre-tokenizer that cuts with these expressions, then spells bytes in visible characters."""
    tokenizers = _library()
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    steps = [Split(tokenizers.Regex(expression), "isolated") for expression in expressions if expression]
    return Steps([*steps, ByteLevel(add_prefix_space=False, use_regex=_GPT2 in expressions)])


class _Metadata:
    """The tokenizer's keys of a GGUF's metadata; a wrong value raises ConfigError with its key."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self._where = metadata, where

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._where}: tokenizer.{key} {problem}")

    def _get(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"tokenizer.{key}", default)
        if value is None:
            raise self.error(key, "is missing: the file holds no complete tokenizer; convert the model again")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r:.80}; it must be a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, (bool, int)):
            raise self.error(key, f"is {value!r:.80}; it must be true or false")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, (list, tuple)) or not value:
            raise self.error(key, f"is {value!r:.80}; it must be a list of strings, not empty")
        bad = next((i for i, item in enumerate(value) if type(item) is not str), None)
        if bad is not None:
            raise self.error(key, f"has {value[bad]!r:.80} at {bad}; all must be strings")
        return list(value)

    def types(self, n_tokens: int) -> list[int]:
        value = self._metadata.get("tokenizer.ggml.token_type")
        if value is None:
            return [1] * n_tokens
        types = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(types, (list, tuple)) or len(types) != n_tokens:
            found = len(types) if hasattr(types, "__len__") else f"{types!r:.80}"
            raise self.error("ggml.token_type", f"has {found} entries; there are {n_tokens} tokens")
        return list(types)

    def token_id(self, key: str, n_tokens: int) -> int | None:
        value = self._metadata.get(f"tokenizer.{key}")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n_tokens:
            raise self.error(key, f"is {value!r:.80}; a token id is 0..{n_tokens - 1}")
        return value

    def bad_merge(
        self, pairs: list[tuple[str, ...]], vocabulary: Mapping[str, int], error: Exception
    ) -> ConfigError:
        """Return an error that names the first wrong merge."""
        for i, pair in enumerate(pairs):
            merge = " ".join(pair)
            if len(pair) != 2:
                return self.error(
                    "ggml.merges", f"has {merge!r:.80} at {i}; a merge is two tokens with a space between"
                )
            for token in (*pair, "".join(pair)):
                if token not in vocabulary:
                    return self.error(
                        "ggml.merges", f"has {merge!r:.80} at {i}, but {token!r:.80} is no token"
                    )
        return self.error("ggml.merges", f"cannot be used ({str(error)[:200]})")


def _json_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file that can be read ({error}); fetch a fresh copy") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: is no JSON object; fetch a fresh copy")
    return value


def _token_ids(config: Mapping[str, Any], key: str, folder: Path, backend: Any) -> list[int]:
    """Return a setting that is one token id, a list of them or missing."""
    value = config.get(key)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        known = isinstance(token, int) and 0 <= token < 2**32 and backend.id_to_token(token) is not None
        if not known:
            raise ConfigError(
                f"{folder}: {key} is {value!r:.80}; a token id is 0..{backend.get_vocab_size() - 1}"
            )
    return ids


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template of a folder, from its own file or `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{folder}: chat_template is {template!r:.80}; it must be a string")
    return template
