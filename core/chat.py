"""A conversation as the text, or the ids, that a chat model was trained to read.

The template is the model's own, in Jinja: chat_template.jinja, or chat_template of tokenizer_config.json. It is filled
in jinja2's immutable sandbox with the helpers that transformers gives it, so the text is the same there. Two things are
not left to the template: how long it may work, and what users may say. The name of a control token inside a message
stays text; only the template itself writes control tokens.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from portlm.errors import FormatError, UsageError
from portlm.files import read_bytes, read_json, shown

if TYPE_CHECKING:
    import jinja2

    from portlm.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_TEMPLATE_CHARS = 2**16
MAX_MESSAGES = 1024
MAX_TEXT_CHARS = 2**22  # of a conversation, and of what is made of it
MAX_LOOPS = 2**20  # turns of all loops together: about a second
MAX_DEPTH = 16
MAX_CONFIG_BYTES = 4 * 2**20

_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of one field: each is filled from the others
_BREAK = (
    "\ue000\ufdd0\ue000"  # put into names of control tokens that a message spells; taken out before encoding
)


class ChatTemplate:
    """A chat template and the names of the special tokens it may use.

    Attributes:
        source: the Jinja text.
        tokens: names such as bos_token, and what they stand for.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """Take a template.

        Raises:
            FormatError: it is too long, or no Jinja.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise FormatError(
                f"the chat template has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}"
            )
        self.source, self.tokens = source, dict(tokens or {})
        self._compiled  # noqa: B018 an error shows now

    @classmethod
    def load(cls, folder: str | os.PathLike[str], name: str = "default") -> "ChatTemplate":
        """Open the template of a model folder.

        Args:
            folder: with chat_template.jinja, or tokenizer_config.json that holds one.
            name: which, where tokenizer_config.json lists several.

        Raises:
            FormatError: a file is damaged, or there is no template.
        """
        root = Path(folder)
        config: Any = {}
        if (root / TOKENIZER_CONFIG).exists():
            config = read_json(root / TOKENIZER_CONFIG, MAX_CONFIG_BYTES)
            if not isinstance(config, dict):
                raise FormatError(f"{root / TOKENIZER_CONFIG} is not a JSON object")
        if (root / TEMPLATE).exists():
            try:
                source: Any = read_bytes(root / TEMPLATE, 4 * MAX_TEMPLATE_CHARS).decode()
            except UnicodeDecodeError as error:
                raise FormatError(f"{root / TEMPLATE} is not UTF-8") from error
        else:
            source = config.get("chat_template")
        if isinstance(source, list):
            source = _listed(source, name, root / TOKENIZER_CONFIG)
        if not isinstance(source, str):
            raise FormatError(f"{root} has no chat template: no {TEMPLATE}, and none in {TOKENIZER_CONFIG}")
        return cls(source, _special_tokens(config))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return a conversation as text.

        Args:
            messages: each with a role and, usually, content; plain data as in JSON.
            add_generation_prompt: end with what begins an answer.
            tools: descriptions of functions, where the template knows them.
            documents: texts to answer from, where the template knows them.
            **variables: what else the template knows.

        Raises:
            UsageError: the template refuses the conversation or needs something that it lacks, or it is too long.
            FormatError: the template works for too long, or does what the sandbox forbids.
        """
        return self._filled(messages, add_generation_prompt, tools, documents, variables, lambda text: text)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: "Tokenizer",
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Return a conversation as ids. Control tokens come from the template alone, never from what a message says.

        Raises:
            UsageError, FormatError: as `render`, and as `Tokenizer.encode`.
        """
        names = [name for name in tokenizer.special if len(name) > 1]
        found = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        spelled = False

        def guard(text: str) -> str:
            nonlocal spelled
            guarded = found.sub(lambda name: name[0][0] + _BREAK + name[0][1:], text.replace(_BREAK, ""))
            spelled = spelled or guarded != text
            return guarded

        text = self._filled(messages, add_generation_prompt, tools, documents, variables, guard)
        if not spelled:
            return tokenizer.encode(text, special=True, add_special_tokens=False)
        ids: list[int] = []
        place = 0
        for name in found.finditer(text):
            ids += tokenizer.encode(text[place : name.start()].replace(_BREAK, ""), add_special_tokens=False)
            ids.append(tokenizer.special[name[0]])
            place = name.end()
        return ids + tokenizer.encode(text[place:].replace(_BREAK, ""), add_special_tokens=False)

    def _filled(
        self,
        messages: Any,
        add_generation_prompt: bool,
        tools: Any,
        documents: Any,
        variables: dict[str, Any],
        guard: Any,
    ) -> str:
        """Return the text, with each text that is filled in changed by ``guard``."""
        import jinja2

        if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) > MAX_MESSAGES:
            raise UsageError(f"a conversation is a list of at most {MAX_MESSAGES} messages")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UsageError(f"each message is an object with a role, got {shown(message)}")
        budget = _Budget()
        plain = budget.plain(
            {"messages": list(messages), "tools": tools, "documents": documents, **variables}, guard
        )
        plain["messages"] = [_with_reasoning(message) for message in plain["messages"]]
        filled = {**self.tokens, **plain, "add_generation_prompt": add_generation_prompt}
        parts: list[str] = []
        size = 0
        try:
            self._budget[:] = [budget]
            for part in self._compiled.generate(**filled):
                parts.append(part)
                size += len(part)
                if size > MAX_TEXT_CHARS:
                    raise UsageError(
                        f"the chat template makes more than {MAX_TEXT_CHARS} characters of this conversation"
                    )
        except _RefusedError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from error
        except jinja2.exceptions.SecurityError as error:
            raise FormatError(f"the chat template does what the sandbox forbids: {error}") from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
            LookupError,
        ) as error:
            raise UsageError(
                f"the chat template cannot be filled with this conversation: {error!s:.300}"
            ) from error
        except RecursionError as error:
            raise FormatError("the chat template calls itself without end") from error
        return "".join(parts)

    @cached_property
    def _budget(self) -> "list[_Budget]":
        """What the filling in progress may still spend."""
        return [_Budget()]

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        """The template, ready to be filled."""
        import jinja2

        try:
            return _environment(self._budget).from_string(self.source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise FormatError(f"the chat template is no Jinja that can be read: {error!s:.300}") from error


class _RefusedError(Exception):
    """The template called raise_exception."""


class _Budget:
    """What filling one template may take."""

    def __init__(self) -> None:
        self.loops, self.chars = MAX_LOOPS, MAX_TEXT_CHARS

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items while there are turns left."""
        for item in items:
            self.loops -= 1
            if self.loops < 0:
                raise FormatError(f"the chat template takes more than {MAX_LOOPS} turns of its loops")
            yield item

    def plain(self, value: Any, guard: Any, depth: int = 0) -> Any:
        """Return plain data anew, of str, int, float, bool, None, list and dict, so that no method is reached.

        Raises:
            UsageError: it holds something else, is nested too deeply or too long.
        """
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            self.chars -= len(value)
            if self.chars < 0:
                raise UsageError(f"the conversation has more than {MAX_TEXT_CHARS} characters")
            return guard(str.__str__(value))
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if depth > MAX_DEPTH:
            raise UsageError(f"the conversation is nested more than {MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            return {str(key): self.plain(item, guard, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(item, guard, depth + 1) for item in value]
        raise UsageError(f"a conversation is plain data, and a {type(value).__name__} is none")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Fill in the other names of a message's reasoning, as transformers does."""
    said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _environment(budget: list[_Budget]) -> "jinja2.Environment":
    """Return the sandbox, with transformers' helpers, in which loops and growing texts are counted."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Counted(NodeTransformer):
        """Passes what is looped over, and what texts are joined to, through a count."""

        def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 jinja's name
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "counted_turns", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
            self.generic_visit(node)
            return nodes.Filter(node, "measured", [], [], None, None, lineno=node.lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**"))

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            return Counted().visit(super()._parse(source, name, filename))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or (operator == "*" and not _is_small(left, right)):
                raise FormatError(f"the chat template multiplies or raises too large things: {operator}")
            return measured(super().call_binop(context, operator, left, right))

    class Generation(jinja2.ext.Extension):
        """The marks around what an assistant said, which change nothing in the text."""

        tags = {"generation"}  # noqa: RUF012 as jinja declares it

        def parse(self, parser: "jinja2.parser.Parser") -> nodes.CallBlock:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

        def _body(self, caller: Any) -> Any:
            return caller()

    def measured(value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT_CHARS:
            raise FormatError(f"the chat template makes a text of more than {MAX_TEXT_CHARS} characters")
        return value

    def raise_exception(message: object) -> NoReturn:
        raise _RefusedError(str(message)[:1000])

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters |= {
        "tojson": tojson,
        "measured": measured,
        "counted_turns": lambda items: budget[0].turns(items),
    }
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(str(form)),
    }
    return environment


def _is_small(left: Any, right: Any) -> bool:
    """Whether a product stays small: of numbers, or of a text and how often it is repeated."""
    if isinstance(left, str | list | tuple):
        left, right = right, left
    if isinstance(right, str | list | tuple):
        return isinstance(left, int) and left * len(right) <= MAX_TEXT_CHARS
    return all(isinstance(x, float) or (isinstance(x, int) and abs(x) < 2**64) for x in (left, right))


def _listed(templates: list[Any], name: str, path: Path) -> str:
    """Return one of several templates, {"name": ..., "template": ...}."""
    found: dict[str, str] = {}
    for entry in templates:
        said = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if isinstance(said[0], str) and isinstance(said[1], str):
            found[said[0]] = said[1]
    if name not in found:
        raise FormatError(
            f"{path} has no chat template {shown(name)}, only {', '.join(map(shown, sorted(found)))}"
        )
    return found[name]


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return bos_token and the others as templates know them: by name, as text."""
    keys = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    found = {}
    for key in keys:
        value = config.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[key] = content
    return found
