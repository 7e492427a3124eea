"""Published tokenizers, chat templates and dialogues: the same ids and texts as the libraries that made them.

Needs the data that CONTINUO_TEST_DATA names; the other files here hold each property on our own specimens.
"""

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken

from engine.errors import InvalidRequest
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.next_prompt import next_prompt
from engine.text.past import Past, PastTurn
from engine.text.tokenizer import Tokenizer
from engine.types import Message

CLOSING = {
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "minimind": "<|im_end|>",
    "phi-3-mini": "<|end|>",
}
REWRITES_REPLIES = {"google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct"}  # both strip white space
CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]


@pytest.fixture(scope="module", params=["gpt2", "minimind", "phi-3-mini"])
def encodings(request, test_data: Path) -> tuple[Tokenizer, list[tuple[str, list[int], bool]]]:
    reference = json.loads((test_data / "tokenizers/reference_encodings.json").read_text())
    of_this = reference["tokenizers"][request.param]
    cases = list(zip(reference["texts"], of_this["ids"], of_this["decoded_equals_text"], strict=True))
    tokenizer = Tokenizer.from_dir(test_data / "tokenizers" / request.param)
    assert len(cases) == 76 and tokenizer.vocab_size == of_this["vocab_size"]
    return tokenizer, cases


def test_published_tokenizers_give_the_reference_ids_and_texts(encodings):
    tokenizer, cases = encodings
    for text, ids, comes_back in cases:
        assert tokenizer.encode(text, allow_special=True) == ids
        assert (tokenizer.decode(ids, skip_special=False) == text) is comes_back


def test_published_tokenizers_stream_every_reference_text_token_by_token(encodings):
    tokenizer, cases = encodings
    for _, ids, _ in cases:
        detokenizer = IncrementalDetokenizer(tokenizer, ("never in a text",))
        streamed = "".join(detokenizer.push([id]) for id in ids) + detokenizer.finish()
        assert streamed == tokenizer.decode(ids, skip_special=True)


def test_appended_text_of_the_small_trained_model_has_the_reference_ids(test_data):
    folder = test_data / "models/stories260k"
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.prompt_prefix_ids == [1]
    cases = json.loads((folder / "reference_generations.json").read_text())["cases"]
    assert sum(len(case["turns"]) for case in cases) > len(cases)
    for case in cases:
        last_id = None
        for turn in case["turns"]:
            if last_id is None:
                ids = tokenizer.prompt_prefix_ids + tokenizer.encode(turn["append_text"], allow_special=True)
            else:  # the reference wrote a space between reply and appended text
                ids = tokenizer.encode(" " + turn["append_text"], allow_special=True, after=last_id)
            assert ids == turn["append_ids"]
            text = tokenizer.decode(turn["generated_ids"], skip_special=True, after=ids[-1])
            assert text.removeprefix(" ") == turn["generated_text"]
            last_id = turn["generated_ids"][-1]


def load_template(test_data: Path, name: str) -> tuple[Tokenizer, ChatTemplate, dict]:
    """A published template with its own tokenizer, or with GPT-2's and the control tokens that it writes."""
    reference = json.loads((test_data / "chat_templates/reference_renderings.json").read_text())[name]
    own = test_data / "tokenizers" / name / "tokenizer.json"
    if own.exists():
        definition = own.read_text()
    else:
        backend = tokenizers.Tokenizer.from_file(str(test_data / "tokenizers/gpt2/tokenizer.json"))
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
        definition = backend.to_str()
    source = (test_data / f"chat_templates/{name}.jinja").read_text()
    named = {key: text for key in ("bos_token", "eos_token") if (text := reference[key])}
    tokenizer = Tokenizer(definition, named, source)
    return tokenizer, ChatTemplate(tokenizer), reference


@pytest.mark.parametrize("name", CLOSING)
def test_published_templates_give_the_reference_renderings_and_refusals(test_data, name):
    _, template, reference = load_template(test_data, name)
    assert len(reference["cases"]) == 7
    for case in reference["cases"]:
        messages = [Message(message["role"], message["content"]) for message in case["messages"]]
        asks_for_reply = case["add_generation_prompt"]
        if "raises" in case:
            with pytest.raises(InvalidRequest) as refusal:
                template.render(messages, add_generation_prompt=asks_for_reply, now=0.0)
            assert str(refusal.value).endswith(case["raises"].removeprefix("TemplateError: "))
        else:
            rendered = template.render(messages, add_generation_prompt=asks_for_reply, now=0.0)
            assert rendered == case["rendered"]


@pytest.mark.parametrize("name", CLOSING)
def test_real_dialogues_append_to_the_full_render_or_say_that_they_do_not(test_data, name):
    tokenizer, template, _ = load_template(test_data, name)
    closing = tokenizer.control_tokens[CLOSING[name]]
    num_turns = num_rewritten = 0
    with gzip.open(test_data / "conversations/mt_bench_101.jsonl.gz", "rt") as lines:
        dialogues = [json.loads(line)["messages"] for line in lines][:100]
    for dialogue in dialogues:
        messages = [Message(message["role"], message["content"]) for message in dialogue]
        past, said = Past(), []
        for question, answer in zip(messages[::2], messages[1::2], strict=False):
            prompt = next_prompt(template, tokenizer, past, [question], now=0.0)
            full = template.render([*said, question], add_generation_prompt=True, now=0.0)
            full = tokenizer.as_spelled(full, allow_special=True)
            matches = prompt.rewritten_from is None
            text = tokenizer.decode(prompt.ids, skip_special=False, after=past.last_id)
            assert full.endswith(tokenizer.as_spelled(text, allow_special=True))
            sampled = tokenizer.encode(answer.content, allow_special=False, after=prompt.ids[-1])
            turn = PastTurn((question,), prompt.first_token, tuple(prompt.ids), (*sampled, closing), True)
            past.extend(tokenizer, None, turn)
            assert past.said[-1].value == {"role": "assistant", "content": answer.content}
            begin = past.segments[-1].start
            assert (past.text[:begin] == full) is matches
            said += [question, answer]
            num_turns, num_rewritten = num_turns + 1, num_rewritten + (not matches)
    assert num_turns > 200
    if name in REWRITES_REPLIES:
        assert 0 < num_rewritten < num_turns / 20
    else:
        assert num_rewritten == 0
