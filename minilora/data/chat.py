"""Chat templates: turn a conversation into text as transformers does, in a sandbox.

Templates are programs that come with a model, so they run in a sandbox that ends their loops.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from minilora.config import ConfigError
from minilora.data.tokenizer import Messages

INSTALL = "pip install 'minilora[llm]' (in a checkout: pip install -e '.[llm]')"
MAX_LOOP_TURNS = 200_000
MAX_TEXT_LENGTH = 16_000_000
"""Longest text that a template may write, in characters."""
_PADDING_METHODS = {
    "batch",
    "center",
    "expandtabs",
    "format",
    "format_map",
    "indent",
    "ljust",
    "rjust",
    "slice",
    "wordwrap",
    "zfill",
}


class ChatTemplate:
    r"""A chat template in Jinja, compiled at its first use.

    A template sees `messages`, `add_generation_prompt`, the special tokens by name, and what transformers
    gives: `raise_exception`, `strftime_now` and `tojson`. It reaches nothing else, and its loops end. It must
    not repeat or pad strings. A string that a loop doubles still fills the memory, as in transformers.

    Parameters
    ----------
    source : str
        The template.
    where : str
        The file it comes from, for messages.
    tokens : mapping of str to str
        Special tokens by name, such as `{"bos_token": "<s>"}`.

    Raises
    ------
    ImportError
        At the first use: jinja2 is not installed.
    ConfigError
        At the first use: the template is no Jinja, raises, or does not end.

    Examples
    --------
    >>> template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hi"}])
    'user: Hi\n'
    """

    def __init__(
        self, source: str, where: str = "chat template", tokens: Mapping[str, str] | None = None
    ) -> None:
        self.source, self.where, self.tokens = source, where, dict(tokens or {})

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation; `add_generation_prompt` adds what opens the assistant's turn.

        Raises
        ------
        ConfigError
            `messages` is no conversation, or the template raises or does not end.
        """
        chat = [dict(message) for message in check_messages(messages)]
        template = self._compiled
        left = MAX_LOOP_TURNS

        def spend() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise ConfigError(f"its loops turn more than {MAX_LOOP_TURNS} times")

        parts: list[str] = []
        size = 0
        try:
            for part in template.generate(
                messages=chat,
                tools=None,
                documents=None,
                _spend=spend,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_TEXT_LENGTH:
                    raise ConfigError(f"it writes more than {MAX_TEXT_LENGTH} characters")
        except (Exception, RecursionError, MemoryError) as error:
            raise self._refuse(error) from None
        return "".join(parts)

    @cached_property
    def _compiled(self) -> Any:
        try:
            from jinja2 import ext, nodes
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ImportError(f"chat templates need jinja2: {INSTALL}") from None

        class Generation(ext.Extension):
            """`{% generation %}…{% endgeneration %}`: marks the assistant's words, and writes nothing."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        class Sandbox(ImmutableSandboxedEnvironment):
            """jinja2's sandbox, which here also refuses expressions that fill the memory in one step."""

            intercepted_binops = frozenset({"*", "**", "%"})

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                if operator == "**" or not all(isinstance(value, (int, float)) for value in (left, right)):
                    raise TemplateError(
                        f"{left!r:.20} {operator} {right!r:.20} is not allowed: it may fill the memory"
                    )
                return super().call_binop(context, operator, left, right)

            def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
                if isinstance(obj, str) and attr in _PADDING_METHODS:
                    return False
                return super().is_safe_attribute(obj, attr, value)

            def wrap_str_format(self, value: Any) -> Any:
                return None  # then str.format is checked like any attribute, and refused

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's filter escapes HTML

        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
        environment.filters["tojson"] = to_json
        for name in _PADDING_METHODS & environment.filters.keys():
            del environment.filters[name]
        del environment.globals["lipsum"]
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda f: datetime.now().strftime(f),
        }
        try:
            tree: Any = environment.parse(self.source)
            for loop in tree.find_all((nodes.For, nodes.Macro)):  # the sandbox alone lets loops run for years
                call = nodes.Call(nodes.Name("_spend", "load"), [], [], None, None)
                loop.body.insert(0, nodes.ExprStmt(call))
            code = environment.compile(tree)
            return environment.template_class.from_code(environment, code, environment.make_globals(None))
        except (Exception, RecursionError, MemoryError) as error:
            raise self._refuse(error) from None

    def _refuse(self, error: BaseException) -> ConfigError:
        lineno = getattr(error, "lineno", None)
        line = f", line {lineno}" if lineno else ""
        problem = str(error)[:300] or type(error).__name__
        return ConfigError(
            f"{self.where}: the chat template cannot be used{line}: {problem}; "
            "give raw text (--prompt, or JSONL with prompt and completion)"
        )


def check_messages(messages: Any, what: str = "messages") -> Messages:
    """Return the messages if they are a conversation: at least one object with strings `role` and `content`.

    Raises
    ------
    ConfigError
        They are not.

    Examples
    --------
    >>> check_messages([{"role": "user"}])
    Traceback (most recent call last):
    minilora.config.ConfigError: messages[0] has no 'content': a message is {"role": "user", "content": "..."}
    """
    form = 'a message is {"role": "user", "content": "..."}'
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConfigError(f"{what}={messages!r:.80}: give a list of messages, at least one; {form}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"{what}[{i}] is {message!r:.80}: {form}")
        for field in ("role", "content"):
            if field not in message:
                raise ConfigError(f"{what}[{i}] has no {field!r}: {form}")
            if not isinstance(message[field], str):
                raise ConfigError(
                    f"{what}[{i}].{field} is {message[field]!r:.80}: it must be a string; {form}"
                )
    return messages
