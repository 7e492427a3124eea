"""The demo: played whole against real servers, and its judgement on made-up outcomes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from rpc._generated import continuo_pb2 as pb
from rpc.client import FinishReason, Turn
from tests.tools.conftest import ROOT
from tests.tools.talking_models import REPLY, write_talking_model
from tools.arguments import BUNDLED_MODEL
from tools.demo_model.story import NOT_TOLD, Ask, Tell
from tools.demo_play import Cast, Exchange, Speaker, make_cast, make_control, num_comparable
from tools.demo_score import Score

PROMISED = set(
    """turns prompt_tokens cached_device_tokens cached_host_tokens recomputed_tokens recall_asked
    recall_correct kills equal_turns compared_turns computed_tokens stateless_computed_tokens ttft_last_ms
    stateless_ttft_last_ms seconds""".split()
)


def play_demo(environment: dict[str, str], *arguments: object) -> tuple[int, str, dict]:
    """Exit code, what was shown, and the figures of the last line."""
    ended = subprocess.run(
        [sys.executable, "-m", "tools.demo", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.stderr == ""
    shown, _, last = ended.stdout.rstrip("\n").rpartition("\n")
    return ended.returncode, shown, json.loads(last)


@pytest.mark.skipif(not BUNDLED_MODEL.is_dir(), reason="the bundled model is not in this checkout")
def test_the_bundled_model_remembers_through_pressure_and_kill_9(environment):
    code, shown, figures = play_demo(environment)
    assert code == 0, shown
    assert PROMISED <= figures.keys()
    assert figures["kills"] == 1 and figures["cut_off_turns"] >= 1
    assert figures["equal_turns"] == figures["compared_turns"] > 0.9 * figures["turns"] > 100
    assert figures["recall_correct"] >= 0.95 * figures["recall_asked"] > 30
    assert figures["control_not_told"] == figures["control_asked"] > 30
    assert figures["recomputed_tokens"] > 1_000 and figures["cached_host_tokens"] > 500
    assert 3 * figures["computed_tokens"] < figures["stateless_computed_tokens"]
    assert "re-reading every turn" in shown and "facts right" in shown


def test_a_model_of_ones_own_is_played_and_not_judged(environment, tmp_path):
    model = write_talking_model(tmp_path / "model", max_positions=8192)
    code, shown, figures = play_demo(environment, "--model", model)
    assert code == 0, shown
    assert PROMISED <= figures.keys()
    assert figures["recall_correct"] == 0 < figures["recall_asked"]
    assert figures["equal_turns"] == figures["turns"] == sum(len(s.steps) for s in make_cast().everybody)
    assert figures["cached_device_tokens"] + figures["recomputed_tokens"] < figures["prompt_tokens"]
    assert figures["computed_tokens"] < figures["stateless_computed_tokens"]
    assert REPLY in shown


def test_a_model_that_is_not_there_is_refused(environment):
    ended = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--model", "/no/model"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "there is no folder /no/model" in ended.stderr


def test_the_script_is_always_the_same_and_the_control_asks_what_the_friends_ask():
    lines, again = ([[step.text for step in s.steps] for s in make_cast().everybody] for _ in range(2))
    assert lines == again
    for friend, stranger in zip(make_cast().friends, make_control(), strict=True):
        assert list(stranger.steps) == [step for step in friend.steps if isinstance(step, Ask)]


def test_no_question_comes_before_the_kill():
    cast = make_cast()
    for friend in cast.friends:
        opening, closing = friend.steps[: cast.num_opening + 2], friend.steps[cast.num_opening + 2 :]
        assert not any(isinstance(step, Ask) for step in opening)
        assert sum(isinstance(step, Tell) for step in opening) + 1 == sum(isinstance(s, Ask) for s in closing)


def spoken(step, answer: str, ids: tuple[int, ...] = (1,), ttft_s: float = 0.01) -> Exchange:
    usage = pb.Usage(
        prompt_tokens=100, cached_device_tokens=60, recomputed_tokens=30, new_tokens=10, completion_tokens=5
    )
    turn = Turn("t", answer, ids, FinishReason.STOP_TOKEN, None, usage, pb.Timing(), 900, 105, False)
    return Exchange(step, turn, ttft_s)


def speaker(*exchanges: Exchange) -> Speaker:
    speaker = Speaker([exchange.step for exchange in exchanges])
    speaker.exchanges += exchanges
    return speaker


TOLD = Ask("What is my cat called?", "Miso", told=True)
UNTOLD = Ask("What is my dog called?", NOT_TOLD, told=False)
UNKNOWN = f"You {NOT_TOLD} that."


def score_of(
    answers: list[str],
    stranger: str = UNKNOWN,
    ids_again: tuple[int, ...] = (1,),
    num_comparable: int | None = None,
) -> Score:
    told = [spoken(Tell("My cat is called Miso."), "I see.", ttft_s=0.02)]
    asked = [spoken(TOLD, answer) for answer in answers]
    untold = [spoken(UNTOLD, UNKNOWN, ttft_s=0.04)]
    kept = Cast((speaker(*told, *asked, *untold),), (), 1)
    again = [*told, *asked, spoken(UNTOLD, UNKNOWN, ids_again, ttft_s=0.4)]
    control = [speaker(spoken(TOLD, stranger), spoken(UNTOLD, UNKNOWN))]
    comparable = [len(again) if num_comparable is None else num_comparable]
    return Score(kept, control, Cast((speaker(*again),), (), 1), comparable, 1, True, 12.34)


def test_the_figures_count_what_was_asked_computed_and_equal():
    figures = score_of(["It is Miso."] * 2 + ["It is Misoko."]).figures()
    expected = {
        "turns": 5,
        "prompt_tokens": 500,
        "cached_device_tokens": 300,
        "recomputed_tokens": 150,
        "computed_tokens": 5 * 45,
        "recall_asked": 3,
        "recall_correct": 2,
        "control_asked": 2,
        "control_not_told": 2,
        "ttft_first_ms": 20.0,
        "ttft_last_ms": 40.0,
        "stateless_ttft_last_ms": 400.0,
    }
    assert {key: figures[key] for key in expected} == expected


def test_a_score_fails_for_lost_facts_for_differences_and_for_a_control_that_knows():
    right = ["It is Miso."] * 20
    assert score_of(right).failures() == []
    assert score_of([*right[1:], "It is Max."]).failures() == []  # 95 %
    assert score_of([*right[2:], "It is Max.", "Rex."]).failures() == ["Only 18 of 20 facts came back right."]
    assert score_of(right, ids_again=(2,)).failures() == ["1 answers differ between the two runs."]
    assert score_of(right, stranger="Miso.").failures() == ["1 answers claim to know what nobody had told."]
    assert replace(score_of(right, stranger="Miso."), judged=False).failures() == []


def test_turns_after_an_unusual_spelling_are_not_compared():
    figures = score_of(["It is Miso."], ids_again=(2,)).figures()
    assert (figures["compared_turns"], figures["equal_turns"]) == (3, 2)
    figures = score_of(["It is Miso."], ids_again=(2,), num_comparable=2).figures()
    assert (figures["compared_turns"], figures["equal_turns"]) == (2, 2)


async def test_a_reply_in_other_tokens_than_its_text_has_ends_what_can_be_compared():
    class Client:
        async def tokenize(self, text):
            return {"one": (1,), "two": (2, 3), "odd": (4, 5)}[text]

    as_usual = [spoken(TOLD, "one", (1, 99)), spoken(TOLD, "two", (2, 3, 99))]  # 99 ends the reply
    assert await num_comparable(Client(), speaker(*as_usual)) == 2
    odd = spoken(TOLD, "odd", (45, 99))
    assert await num_comparable(Client(), speaker(as_usual[0], odd, *as_usual)) == 2
    assert await num_comparable(Client(), speaker(odd, *as_usual)) == 1
