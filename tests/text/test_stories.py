"""A story of each kind of template: what its turns append is what `transformers` renders, or is reported."""

import pytest

from engine.text_service import TurnPrompt
from engine.types import RewritePolicy
from tests.text.chat import user
from tests.text.telling import Step, Story, assistant, result, say

FIND = '{"type": "function", "function": {"name": "find", "description": "Where a cat is", "parameters": {}}}'
CALL = '{"id": "123456789", "type": "function", "function": {"name": "find", "arguments": {"cat": "Miso"}}}'


PLAIN = (
    say("Hello, Miso!", user("My cat is called Miso.")),
    Step((user("She lives by the sea."),)),
    say("Miso.", user("What is she called?")),
    say("By the sea.", user("Where?")),
)
ALTERNATING = (
    say(" Hello, Miso!", user("My cat is called Miso.")),
    say(" Miso.", user("And?")),
    say(" 2", user("1")),
)
CALLING = (
    say('{"name": "find", "parameters": {"cat": "Miso"}}', user("Where is Miso?")),
    Step((result("in the house"),)),
    say("In the house.", result("by the sea")),
    Step((assistant("", CALL), result("away"))),
    say("Away.", user("And now?")),
)
CALLED = (user("Where is Miso?"), assistant("", CALL), result("in the house"), assistant("In the house."))
THOUGHT = "<think>\nhm\n</think>\n\nHello."
THINKING = (
    say(THOUGHT, user("My cat is called Miso.")),
    say("<think>\nso\n</think>\n\nMiso.", user("What is she called?")),
    say("Well.", user("And?")),
)
STORIES = {
    "a date line": Story("date_line", PLAIN),
    "no system message of its own": Story("date_line", PLAIN, system=None),
    "tools in the first user message": Story("tools_first_user", CALLING, tools=(FIND,)),
    "tools in the first user message, called before": Story(
        "tools_first_user", (say("Still.", user("And now?")),), tools=(FIND, FIND), history=CALLED
    ),
    "tools in the system block": Story("tools_system", CALLING, tools=(FIND, FIND)),
    "tools in the system block, called before": Story(
        "tools_system", PLAIN, system=None, tools=(FIND,), history=CALLED
    ),
    "calls by id": Story("calls", CALLING[:3]),
    "calls by id, made before": Story("calls", (say("Well.", user("And?")),), history=CALLED),
    "tools that move to the last question": Story(
        "calls", (*CALLING[:1], say("Away.", user("And now?"))), frozenset({1}), tools=(FIND,)
    ),
    "system in the first user message": Story("system_in_user", ALTERNATING),
    "no system message": Story("system_in_user", ALTERNATING, system=None),
    "white space that is kept": Story("ordinary", (say(" a ", user(" b\n")), say("\n", user("c")), *PLAIN)),
    "white space that is stripped": Story(
        "trimming",
        (say("a", user(" b ")), *(say(reply, user("c")) for reply in (" d", "e", "f\n", "g"))),
        frozenset({2, 3, 4}),
        system=None,
    ),
    "thinking that is stripped": Story("reasoning_kept", THINKING, frozenset({1, 2})),
    "thinking that is kept while tools are called": Story(
        "reasoning_kept",
        (*THINKING[:1], say("Good.", result("12 cups")), say("Well.", user("And?"))),
        frozenset({2}),
    ),
    "thinking that came from elsewhere": Story(
        "reasoning_kept",
        (say("Miso.", user("Again?")), say("Yes.", user("Sure?"))),
        history=(user("Miso."), assistant(THOUGHT), user("Who?"), assistant("Miso.")),
    ),
    "thinking that came last from elsewhere": Story(
        "reasoning_kept",
        (say("Miso.", user("Who?")),),
        frozenset({0}),
        history=(user("Miso."), assistant(THOUGHT)),
    ),
    "a header for the reply in every render": Story("always_asking", PLAIN),
    "past replies left out": Story("forgetting", PLAIN, frozenset({1, 2, 3})),
    "past replies replaced": Story("replacing", PLAIN, frozenset({1, 2, 3})),
}


@pytest.mark.filterwarnings("default")  # what a foreign package warns of at import is not ours to judge
@pytest.mark.parametrize("policy", RewritePolicy)
@pytest.mark.parametrize("name", STORIES)
async def test_every_turn_reads_as_transformers_renders_it_or_is_reported(tell, name, policy):
    story = STORIES[name]
    telling = tell(story, policy)
    if story.history:
        ids = await telling.service.history(story.system, story.history, story.tools, telling.now)
        assert telling.spell(ids) == telling.full(*story.history, asks=False)
        await telling.commit(TurnPrompt(ids, 0, None), Step(story.history))
    rewritten = set()
    for number, step in enumerate(story.steps):
        asks = step.reply is not None
        full, before = telling.full(*step.new, asks=asks), telling.ids
        prompt = await telling.take(step)
        held = telling.spell([*before[: prompt.first_token], *prompt.ids])
        added = telling.spell(prompt.ids)
        assert (prompt.rewritten_from is None) is full.startswith(telling.spell(before))
        if prompt.rewritten_from is None or policy is RewritePolicy.STRIP:
            assert held == full if asks else full.startswith(held)
        else:
            rewritten.add(number)
            assert prompt.first_token == len(before)
            assert added.startswith(("\n", "<|im_start|>", "[")) and full.endswith(added)
        assert all(message.content.strip() in added for message in step.new)
        assert telling.past.num_tokens == len(telling.ids)
        assert telling.past.text == telling.spell(telling.ids)
    assert rewritten == (story.rewritten if policy is RewritePolicy.KEEP else set())
