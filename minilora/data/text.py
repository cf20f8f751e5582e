"""The tokenizer of a language model, from a GGUF's metadata or a Hugging Face folder, by the `tokenizers`
library.

Byte-level BPE: a pre-tokenizer cuts the text into words, each word's bytes are spelled in 256 visible
characters (a space is Ġ), and the merges join them in the order in which they were learnt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minilora.config import ConfigError, require
from minilora.data.chat import INSTALL, ChatTemplate
from minilora.data.tokenizer import Messages, TextStream

CONTROL, USER_DEFINED = 3, 4
"""GGUF's token types that are found in a text before it is cut into words; control tokens are no text."""

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
"""Control tokens at which generation ends, besides the file's own end tokens."""

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = ""  # the expression that ByteLevel itself has

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
"""What `tokenizer.ggml.pre` names: the expressions that cut a text into words, one after the other."""


class TextTokenizer:
    """Text to ids and back, with the model's specials and its chat template;
    `minilora.data.tokenizer.Tokenizer`.

    Make one with `from_gguf` or `from_folder`.

    Attributes:
        vocab_size: the number of ids.
        bos_id: the token that begins a document; None if there is none.
        eos_id: the token that ends a document or a turn.
        pad_id: an id for filling rows.
        stop_ids: the tokens at which generation ends.
        begin: what `encode` puts before a text: `(bos_id,)` or nothing.
        end: what `encode` puts after it.
        backend: the `tokenizers.Tokenizer`.
        template: the chat template; None if the model has none.
        has_template: whether there is one.
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
        pad = next(token for token in (special.get("pad"), special.get("unk"), eos) if token is not None)
        self.bos_id, self.eos_id, self.pad_id = special.get("bos"), eos, pad
        require(
            not add_bos or self.bos_id is not None, f"{where}: add_bos_token", True, "needs a bos_token_id"
        )
        self.begin: tuple[int, ...] = (self.bos_id,) if add_bos and self.bos_id is not None else ()
        self.end = (eos,) if add_eos else ()
        added = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.stop_ids = frozenset({eos, *stops, *(added[name] for name in END_OF_TURN if name in added)})
        names = {f"{name}_token": backend.id_to_token(i) for name, i in special.items() if i is not None}
        self.template = ChatTemplate(template, where, names) if template is not None else None
        self.has_template = self.template is not None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str = "GGUF") -> TextTokenizer:
        """Make the tokenizer that a GGUF's metadata describe (`formats.gguf.GGUFFile(path).metadata`).

        Args:
            metadata: the keys `tokenizer.ggml.*` and `tokenizer.chat_template`; others are not looked at.
            where: the file, for messages.

        Raises:
            ImportError: tokenizers is not installed. ConfigError: no byte-level BPE, an unknown
            pre-tokenizer, no merges, contradictions; the message names the key.
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
        try:  # from dict and tuples: a quarter of the time that tokenizer.json takes
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
        """Make the tokenizer of a Hugging Face folder: tokenizer.json, and what others of its files say of
        specials and chat.

        Read are tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and
        chat_template.jinja, as far as they are there.

        Raises:
            ImportError: tokenizers is not installed.
            ConfigError: no tokenizer.json, or a file that cannot be read; the message names it.
        """
        tokenizers = _library()
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            hint = "; a SentencePiece tokenizer.model alone is not read: save the folder again with transformers' fast tokenizer"
            raise ConfigError(f"{path}: no such file{hint if (folder / 'tokenizer.model').is_file() else ''}")
        try:
            raw = path.read_bytes()
            backend = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:
            raise ConfigError(
                f"{path}: not a tokenizer that can be read ({str(error)[:200]}); fetch a fresh copy"
            ) from None
        backend.no_truncation()
        backend.no_padding()
        config, special_map, generation, model = (
            _json_object(folder / name)
            for name in (
                "tokenizer_config.json",
                "special_tokens_map.json",
                "generation_config.json",
                "config.json",
            )
        )
        special: dict[str, int | None] = {}
        for name in ("bos", "eos", "unk", "pad"):
            token = config.get(f"{name}_token") or special_map.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            special[name] = backend.token_to_id(token) if isinstance(token, str) else None
            if isinstance(token, str) and special[name] is None:
                raise ConfigError(
                    f"{folder}: {name}_token is {token!r:.80}, which tokenizer.json does not have"
                )
        ends = {
            *_ids(generation, "eos_token_id", folder, backend),
            *_ids(model, "eos_token_id", folder, backend),
        }
        if special["eos"] is None and ends:
            special["eos"] = min(ends)
        plain, whole = (
            backend.encode("a", add_special_tokens=with_special).ids for with_special in (False, True)
        )
        add_bos, add_eos = (
            config.get(f"add_{name}_token") for name in ("bos", "eos")
        )  # said there: it counts
        if add_bos is None:
            add_bos = special["bos"] is not None and len(whole) > len(plain) and whole[0] == special["bos"]
        if add_eos is None:
            add_eos = special["eos"] is not None and len(whole) > len(plain) and whole[-1] == special["eos"]
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
        """Return the texts of `tokenizer.json` and `tokenizer_config.json`, which `from_folder` and
        transformers read."""
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
        """Return the ids of a text; special tokens written in it are found.

        Args:
            text: any text.
            add_special: put BOS before and EOS after it where the model wants them.

        Raises:
            ConfigError: the text is no string, or holds half a surrogate pair.
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

        Raises:
            ConfigError: an id outside 0..vocab_size-1.
        """
        numbers = [int(i) for i in ids]
        bad = next((i for i, number in enumerate(numbers) if not 0 <= number < self.vocab_size), None)
        if bad is not None:
            raise ConfigError(
                f"ids[{bad}] is {numbers[bad]}: a token id is 0..{self.vocab_size - 1}; "
                "these ids belong to another vocabulary"
            )
        return str(self.backend.decode(numbers, skip_special_tokens=skip_special))

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, by the model's chat template.

        Raises:
            ConfigError: no template, messages that are none, a template that raises or does not end.
            ImportError: jinja2 is not installed.
        """
        if self.template is None:
            raise ConfigError(
                f"{self.where}: no chat template; give raw text (--prompt, or JSONL with prompt and completion)"
            )
        return self.template.render(messages, add_generation_prompt)

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation; by default the assistant is to speak next."""
        return self.encode(self.render(messages, add_generation_prompt), add_special=False)

    def stream(self) -> TextStream:
        """Return a decoder for ids that come one by one."""
        return TextStream(self.decode, self._byte_ids.__contains__)

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        """Ids of `<0x00>`…`<0xFF>`, with which SentencePiece spells what it has no token for: a run of them
        is decoded as one."""
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
    """Return the pre-tokenizer that cuts at these expressions, then spells bytes in visible characters."""
    tokenizers = _library()
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    steps = [Split(tokenizers.Regex(expression), "isolated") for expression in expressions if expression]
    return Steps([*steps, ByteLevel(add_prefix_space=False, use_regex=_GPT2 in expressions)])


class _Metadata:
    """Reads the tokenizer's keys of a GGUF's metadata, and refuses what they cannot be."""

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
            raise self.error(
                "ggml.token_type",
                f"has {len(types) if hasattr(types, '__len__') else types!r:.80} entries; "
                f"there are {n_tokens} tokens",
            )
        return list(types)

    def token_id(self, key: str, n_tokens: int) -> int | None:
        value = self._metadata.get(f"tokenizer.{key}")
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n_tokens
        ):
            raise self.error(key, f"is {value!r:.80}; a token id is 0..{n_tokens - 1}")
        return value

    def bad_merge(
        self, pairs: list[tuple[str, ...]], vocabulary: Mapping[str, int], error: Exception
    ) -> ConfigError:
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
    """Return a JSON file's object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file that can be read ({error}); fetch a fresh copy") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: is no JSON object; fetch a fresh copy")
    return value


def _ids(config: Mapping[str, Any], key: str, folder: Path, backend: Any) -> list[int]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if (
            not isinstance(token, int)
            or backend.id_to_token(token if 0 <= token < 2**32 else 2**32 - 1) is None
        ):
            raise ConfigError(
                f"{folder}: {key} is {value!r:.80}; a token id is 0..{backend.get_vocab_size() - 1}"
            )
    return ids


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
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
