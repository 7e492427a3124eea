"""Chat messages to text, as the model was trained to read them: a Jinja template in a sandbox.

The environment has the settings, filters and names that `transformers` gives to templates, because that is
what they are written for.  The one difference: time comes from the caller, so a conversation renders the same
on any day.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engine.errors import InvalidRequest, ModelFolderError
from engine.text.messages import as_value, tools_as_values
from engine.text.tokenizer import Tokenizer
from engine.types import Message


class ChatTemplate:
    """The chat template of one model.  Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Compile the tokenizer's template, if any.  Raises ModelFolderError if it is not valid Jinja."""
        self._names = tokenizer.named_tokens
        try:
            source = tokenizer.chat_template
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFolderError(
                f"the model's chat template is not valid: line {error.lineno}: {error.message}; correct"
                " chat_template.jinja or `chat_template` in tokenizer_config.json"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        now: float,
        tools: Sequence[str] = (),
    ) -> str:
        """The text of these messages; with `add_generation_prompt` it ends where the reply begins.

        `now` is in Unix seconds: the time that a template may write into its prompt.  Raises InvalidRequest
        if the model has no template, a tool or tool call is no JSON object, or with the template's own words
        if it refuses the messages.
        """
        return self.render_values(
            [as_value(message, place) for place, message in enumerate(messages)],
            tools_as_values(tools),
            add_generation_prompt=add_generation_prompt,
            now=now,
        )

    def render_values(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool,
        now: float,
    ) -> str:
        """`render` of messages and tools that have the form which templates take."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send token_ids")
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=datetime.fromtimestamp(now).strftime,
                **self._names,
            )
        except Exception as error:  # foreign code can fail in any way; the caller hears how
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error


_DICT_ATTRIBUTES = frozenset(dir(dict))
_HARMLESS = frozenset((str, LoopContext, Namespace))  # apart from str.format and private names


class _GenerationBlock(Extension):
    """`{% generation %}` marks replies for training; here its content is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        """As inherited: a safe attribute, else an item.

        For what is read all the time, that takes an AttributeError (fields of messages) or many checks
        (methods of strings, variables of a loop) each, most of the time of a long render.
        """
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) in _HARMLESS and not attribute.startswith(("_", "format")):
            with suppress(AttributeError):
                return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which is noise in a prompt."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
