"""Any messages in any order, any template: the history is the full render, or the turn says where not."""

import random

import pytest

from engine.errors import InvalidRequest
from engine.types import Message, RewritePolicy
from tests.text.chat import Chat, user

CALL = '{"id": "123456789", "type": "function", "function": {"name": "find", "arguments": {"cat": "Miso"}}}'
TEXTS = (
    *("Hello.", " a ", "\n", "b\n", "", "你好 <|im_end|>", "<s>", "[a reply]"),
    *("<think>\nhm\n</think>\n\nyes", "x</think>y"),
)
TEMPLATES = (
    *("ordinary", "date_line", "trimming", "system_in_user", "always_asking", "reasoning", "reasoning_kept"),
    *("tools", "tools_first_user", "tools_system", "calls", "forgetting", "replacing", "only_last"),
)
SHOWS_ALL = ("ordinary", "date_line", "trimming", "always_asking", "tools", "tools_system")


def any_message(choose: random.Random) -> Message:
    role, text = choose.choices(("user", "assistant", "tool"), (6, 2, 2))[0], choose.choice(TEXTS)
    if role == "tool":
        return Message(role, text, name="find", tool_call_id="123456789")
    calls = (CALL,) if role == "assistant" and choose.random() < 0.4 else ()
    return Message(role, text, tool_calls=calls)


@pytest.mark.parametrize("policy", RewritePolicy)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_prompt_continues_the_render_or_says_from_where_it_does_not(speak, name, policy):
    num_prompts = 0
    for seed in range(8):
        choose = random.Random(seed)
        chat = Chat(*speak(name), tools=choose.choice(((), (CALL,))), policy=policy)
        for _ in range(8):
            new = [any_message(choose) for _ in range(choose.choice((1, 1, 2)))]
            new = choose.choice((new, [user(choose.choice(TEXTS))]))
            asks = choose.random() < 0.8
            try:
                prompt = chat.ask(*new, wants_reply=asks)
            except InvalidRequest as error:
                assert "must alternate" in str(error) or "leaves out the new messages" in str(error)
                continue
            num_prompts += 1
            full = chat.full_render(*new, asks=asks)
            held = chat.tokenizer.decode(chat.ids[: prompt.first_token] + prompt.ids, skip_special=False)
            assert (prompt.rewritten_from is None) is full.startswith(chat.text)
            if prompt.rewritten_from is None or policy is RewritePolicy.STRIP:
                assert held == full if asks else full.startswith(held)
            elif name in SHOWS_ALL:
                assert all(m.content.strip() in prompt.text for m in new if not m.tool_calls)
            if prompt.ids:
                reply, spelled = choose.choice(TEXTS), choose.random() < 0.3
                ids = chat.tokenizer.encode(reply, allow_special=not spelled, after=prompt.ids[-1])
                end = choose.choice(("<|im_end|>", "<|im_end|>", "</s>", None))
                ids += [chat.tokenizer.control_tokens[end]] if end else []
                chat.commit(prompt, tuple(new), tuple(ids) if asks else None)
                assert chat.text == chat.tokenizer.decode(chat.ids, skip_special=False)
    assert num_prompts > 10
