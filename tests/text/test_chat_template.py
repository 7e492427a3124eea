"""Templates render as `transformers` renders them, and refuse in words that reach the caller."""

import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest, ModelFolderError
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.types import Message

SPECIMENS = Path(__file__).parent / "specimens"
DIALOGUE = [
    Message("user", 'Tell me about "tea" & <b>cake</b>\n  in Zürich '),
    Message("assistant", "\n Gladly.  你好 "),
    Message("user", "stop here"),
    Message("assistant", "<think>\nhm\n</think>\n\nNo."),
    Message("user", "Why?"),
]


@pytest.mark.filterwarnings("default")  # what a foreign package warns of at import is not ours to judge
@pytest.mark.parametrize("name", sorted(path.stem for path in SPECIMENS.glob("*.jinja")))
def test_every_kind_of_template_renders_as_transformers_renders_it(speak, name):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, template = speak(name)
    for count in range(1, len(DIALOGUE) + 1):
        for add_generation_prompt in (True, False):
            messages = [{"role": message.role, "content": message.content} for message in DIALOGUE[:count]]
            [expected], _ = render_jinja_template(
                [messages],
                chat_template=tokenizer.chat_template,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.named_tokens,
            )
            rendered = template.render(
                DIALOGUE[:count], add_generation_prompt=add_generation_prompt, now=time.time()
            )
            assert rendered == expected


def test_the_date_in_a_prompt_is_that_of_the_given_time(speak):
    _, template = speak("dated")
    then = datetime(2024, 7, 26, 12).timestamp()
    assert "Today: 2024-07-26\n" in template.render(DIALOGUE, add_generation_prompt=True, now=then)


def test_a_refusal_of_the_template_reaches_the_caller_in_its_own_words(speak):
    _, template = speak("trimming")
    with pytest.raises(InvalidRequest, match="refuses these messages: System role not supported"):
        template.render([Message("system", "Be brief.")], add_generation_prompt=True, now=0)


def test_a_template_that_fails_or_leaves_the_sandbox_is_a_refusal_too(byte_level_dir):
    definition = (byte_level_dir / "tokenizer.json").read_text()
    for source in (
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ):
        template = ChatTemplate(Tokenizer(definition, {}, source))
        with pytest.raises(InvalidRequest, match="the model's chat template refuses these messages: "):
            template.render(DIALOGUE, add_generation_prompt=True, now=0)


@pytest.mark.parametrize(
    "expression",
    [
        *("m.content", "m.absent", "m.absent is defined", "m['items']", "m.get('role')", "m.items() | list"),
        *("m.items", "m.pop('role')", "m.__class__", "m.content.upper()", "m.content.split('e')[-1]"),
        *("m.content.__class__", "m.content.absent", "m.content._x", "'{0.__class__}'.format(m.content)"),
        *(
            "loop.index0",
            "loop.absent",
            "loop._length",
            "loop.cycle(1, 2)",
            "n.x",
            "n.absent",
            "n._y",
            "n.x.upper()",
        ),
        *("m.content.format_map", "m.tool.name", "m.tool.name.strip('f')", "m.list.append(1)", "m.n.real"),
    ],
)
def test_fields_and_methods_are_read_as_the_inherited_sandbox_reads_them(byte_level_dir, expression):
    value = {"role": "user", "content": "Hello", "items": 1, "tool": {"name": "f"}, "list": [], "n": 2}
    source = (
        "{% set n = namespace(x='a', _y='b') %}{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    )

    def outcome(render: Callable[[], str]) -> str:
        try:
            return re.sub("0x[0-9a-f]+", "", render())
        except (InvalidRequest, jinja2.TemplateError) as error:
            return str(error).removeprefix("the model's chat template refuses these messages: ")

    definition = (byte_level_dir / "tokenizer.json").read_text()
    ours = ChatTemplate(Tokenizer(definition, {}, source))
    inherited = ImmutableSandboxedEnvironment().from_string(source)
    assert outcome(lambda: ours.render_values([value], None, add_generation_prompt=True, now=0.0)) == outcome(
        lambda: inherited.render(messages=[value])
    )


def test_without_a_template_text_is_refused_and_the_way_out_is_named(byte_level_dir):
    template = ChatTemplate(Tokenizer.from_dir(byte_level_dir))
    with pytest.raises(InvalidRequest, match="^this model has no chat template; send token_ids$"):
        template.render(DIALOGUE, add_generation_prompt=True, now=0)


def test_a_template_that_is_not_jinja_is_the_folders_fault(byte_level_dir):
    tokenizer = Tokenizer((byte_level_dir / "tokenizer.json").read_text(), {}, "a\n{% if %}")
    with pytest.raises(ModelFolderError, match=r"not valid: line 2: .*chat_template\.jinja"):
        ChatTemplate(tokenizer)
