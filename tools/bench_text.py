"""What the text of one turn costs in a long conversation: rendered, checked, tokenised.

    python -m tools.bench_text [TEMPLATE ...] [--messages 400] [--repeats 200]

Measured are specimens of the tests and each TEMPLATE: a folder with a tokenizer and a chat template, or a
.jinja file, which gets the bundled model's tokenizer.  Messages have about 150 characters.  Times are medians
of `repeats` turns on one thread, as wall and as CPU time: `turn` is all of it, `render` the template alone,
called once; `append` asks for no reply.  Where `rewritten` is true the template renders the past differently,
so a turn that keeps it calls the template again to find out what is new.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engine.text.chat_template import ChatTemplate
from engine.text.next_prompt import TurnPrompt, next_prompt
from engine.text.past import Past, PastTurn
from engine.text.tokenizer import Tokenizer
from engine.types import Message
from tools.measure import median, write_result

ROOT = Path(__file__).parent.parent
SPECIMENS = (
    *("ordinary", "date_line", "trimming", "system_in_user", "tools_first_user", "tools_system", "calls"),
    *("reasoning", "reasoning_kept", "always_asking", "forgetting", "replacing"),
)
SENTENCE = "The cat called Miso lives in a house by the sea, and she is fond of tea."
QUESTION = Message("user", f"{SENTENCE} {SENTENCE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("templates", nargs="*", metavar="TEMPLATE", type=Path, help="folder, or .jinja file")
    parser.add_argument("--messages", type=int, default=400, help="in the conversation before the turn")
    parser.add_argument("--repeats", type=int, default=200, help="turns to measure")
    arguments = parser.parse_args()

    own = [ROOT / f"tests/text/specimens/{name}.jinja" for name in SPECIMENS]
    measured = {}
    for path in [*own, *arguments.templates]:
        measured[path.stem] = figures = _figures(_tokenizer(path), arguments.messages // 2, arguments.repeats)
        print(path.stem, json.dumps(figures), flush=True)
    figures = {"messages": arguments.messages, "repeats": arguments.repeats, "templates": measured}
    print(f"written to {write_result('text', figures)}")


class CountingTokenizer(Tokenizer):
    """Counts the characters that it encodes."""

    num_characters = 0

    def encode(self, text: str, *, allow_special: bool, after: int | None = None) -> list[int]:
        self.num_characters += len(text)
        return super().encode(text, allow_special=allow_special, after=after)


def _tokenizer(path: Path) -> CountingTokenizer:
    if path.is_dir():
        return CountingTokenizer.from_dir(path)
    bundled = ROOT / "tools/demo_model/model"
    config = json.loads((bundled / "tokenizer_config.json").read_text())
    return CountingTokenizer((bundled / "tokenizer.json").read_text(), config, path.read_text())


def _figures(tokenizer: CountingTokenizer, num_turns: int, repeats: int) -> dict[str, Any]:
    template, past, tokenised = ChatTemplate(tokenizer), Past(), []
    ask: Callable[..., TurnPrompt] = partial(next_prompt, template, tokenizer, now=0.0)
    reply = tokenizer.encode(QUESTION.content, allow_special=False, after=1)
    first = _milliseconds(lambda: ask(past, [QUESTION]), repeats)
    for _ in range(num_turns):
        before = tokenizer.num_characters
        prompt = ask(past, [QUESTION])
        tokenised.append(tokenizer.num_characters - before)
        turn = PastTurn((QUESTION,), prompt.first_token, tuple(prompt.ids), tuple(reply), has_reply=True)
        past.extend(tokenizer, None, turn)
    messages = [*(said.value for said in past.said), {"role": "user", "content": QUESTION.content}]
    render = partial(template.render_values, messages, None, add_generation_prompt=True, now=0.0)
    return {
        "history_tokens": past.num_tokens,
        "rewritten": ask(past, [QUESTION]).rewritten_from is not None,
        "render": _milliseconds(render, repeats),
        "turn": _milliseconds(lambda: ask(past, [QUESTION]), repeats),
        "first_turn": first,
        "append": _milliseconds(lambda: ask(past, [QUESTION], wants_reply=False), repeats),
        "tokenised_characters": {"turn 2": tokenised[1], f"turn {num_turns}": tokenised[-1]},
    }


def _milliseconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    wall, cpu = [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        work()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    return {"wall_ms": round(1000 * median(wall), 3), "cpu_ms": round(1000 * median(cpu), 3)}


if __name__ == "__main__":
    main()
