"""CPU time that the text of one turn takes in a long conversation: rendered, checked, tokenised.

    python -m tools.bench_text MODEL [--messages 400] [--repeats 20]

MODEL is a folder with a tokenizer and a chat template.  Messages have about 150 characters.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from engine.text.chat_template import ChatTemplate
from engine.text.next_prompt import next_prompt
from engine.text.past import Past, PastTurn
from engine.text.tokenizer import Tokenizer
from engine.types import Message
from tools.measure import write_result

SENTENCE = "The cat called Miso lives in a house by the sea, and she is fond of tea. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder with tokenizer.json and a chat template")
    parser.add_argument("--messages", type=int, default=400, help="in the conversation before the turn")
    parser.add_argument("--repeats", type=int, default=20, help="turns to measure")
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_dir(arguments.model)
    template = ChatTemplate(tokenizer)
    question = [Message("user", SENTENCE * 2)]
    past = _past(template, tokenizer, question, arguments.messages // 2)
    messages = [*past.messages, *question]
    figures = {
        "template": arguments.model.name,
        "messages": len(past.messages),
        "history_tokens": past.num_tokens,
        "render_ms": _median_ms(
            lambda: template.render(messages, add_generation_prompt=True, now=0.0), arguments.repeats
        ),
        "prompt_ms": _median_ms(
            lambda: next_prompt(template, tokenizer, past, question, now=0.0), arguments.repeats
        ),
        "prompt_at_first_turn_ms": _median_ms(
            lambda: next_prompt(template, tokenizer, Past(), question, now=0.0), arguments.repeats
        ),
    }
    print(json.dumps(figures))
    print(f"written to {write_result('text', figures)}")


def _past(template: ChatTemplate, tokenizer: Tokenizer, question: list[Message], num_turns: int) -> Past:
    past = Past()
    reply = tokenizer.encode(SENTENCE * 2, allow_special=False, after=1)
    for _ in range(num_turns):
        prompt = next_prompt(template, tokenizer, past, question, now=0.0)
        past.extend(
            tokenizer,
            None,
            PastTurn(tuple(question), prompt.first_token, tuple(prompt.ids), tuple(reply), has_reply=True),
        )
    return past


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(1000 * (time.thread_time() - start))
    return round(statistics.median(times), 3)


if __name__ == "__main__":
    main()
