"""Judges the demo model on dialogues it has never seen: python -m tools.demo_model.evaluate [--model DIR].

The model plays each dialogue itself (its own replies are the history), greedily, in float32, under each of
the CONDITIONS.  Exits with 1 if it misses a bar; the report goes to tools/results/demo_model.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from tools.demo_model.dialogues import Talk, Turn, is_right, judged_turns, system_prompt
from tools.demo_model.player import Player
from tools.demo_model.slots import SLOTS
from tools.demo_model.values import WORDS, Split

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "demo_model.json"
CLOSE_CALL = 0.01  # top-2 logit margin below which another order of summation may pick the other token
_KNOWS_WHEN_NOT_TOLD = {"not_told": 0.98, "fresh conversation": 0.98}


@dataclass(frozen=True)
class Condition:
    """Which halves a set of new dialogues draws from, and the shares of right answers to reach, by kind."""

    wording: Split
    values: Split
    bars: Mapping[str, float]


CONDITIONS = {
    "new dialogues": Condition(Split.TRAIN, Split.TRAIN, {"recall": 0.98, **_KNOWS_WHEN_NOT_TOLD}),
    "unseen values": Condition(
        Split.TRAIN, Split.HELD_OUT, {"recall name": 0.90, "recall number": 0.90, **_KNOWS_WHEN_NOT_TOLD}
    ),
    "unseen values in unseen wordings": Condition(Split.HELD_OUT, Split.HELD_OUT, {}),
}


@dataclass
class Score:
    """Questions asked and answered rightly, by kind of question."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, str]] = field(default_factory=list)

    def judge(self, turn: Turn, answer: str, kinds: list[str]) -> None:
        """Counts the answer to a question for each of the kinds that it belongs to."""
        assert turn.expected is not None, f"{turn.user!r} is no question"
        right = is_right(answer, turn.expected)
        self.asked.update(kinds)
        self.right.update(kinds if right else [])
        if not right:
            self.wrong.append({"asked": turn.user, "expected": turn.expected, "answered": answer})

    def shares(self) -> dict[str, float]:
        """The share of right answers for each kind of question."""
        return {kind: self.right[kind] / num for kind, num in sorted(self.asked.items())}


def kinds_of(turn: Turn) -> list[str]:
    """The kinds of question that this one counts for, e.g. recall, recall name, recall changed."""
    if turn.category != "recall":
        return [turn.category]
    (slot,) = turn.slots
    kinds = ["recall", f"recall {'favourite' if slot.kind in WORDS else slot.kind}"]
    return [*kinds, "recall changed"] if turn.changed else kinds


def play_dialogue(player: Player, score: Score, condition: Condition, seed: int) -> None:
    """One dialogue of 10-20 turns."""
    rng = Random(seed)
    player.open(system_prompt(rng, condition.wording))
    for turn in judged_turns(rng, condition.wording, condition.values, num_turns=rng.randint(10, 20)):
        answer = player.say(turn.user)
        if turn.expected is not None:
            score.judge(turn, answer, kinds_of(turn))


def play_fresh(player: Player, score: Score, condition: Condition, seed: int) -> None:
    """A fresh conversation in which something is asked for at once."""
    rng = Random(seed)
    player.open(system_prompt(rng, condition.wording))
    turn = Talk(rng, condition.wording, condition.values).ask(rng.choice(SLOTS))
    score.judge(turn, player.say(turn.user), ["fresh conversation"])


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.strip()


def evaluate(folder: Path, num_dialogues: int, seed: int) -> dict[str, object]:
    """The report on the model in this folder, and whether it reaches each bar."""
    player = Player(folder)
    questions: dict[str, dict[str, dict[str, float]]] = {}
    missed: list[str] = []
    for name, condition in CONDITIONS.items():
        score = Score()
        for number in range(num_dialogues):
            play_dialogue(player, score, condition, seed=1_000_000 * seed + number)
            play_fresh(player, score, condition, seed=1_000_000 * seed + number)
        for wrong in score.wrong:
            print(f"{name}: {json.dumps(wrong)}", file=sys.stderr)
        shares = score.shares()
        missed += [f"{name}: {kind} < {bar}" for kind, bar in condition.bars.items() if shares[kind] < bar]
        questions[name] = {
            kind: {"asked": score.asked[kind], "right": score.right[kind], "share": round(share, 4)}
            for kind, share in shares.items()
        }
    return {
        "command": f"python -m tools.demo_model.evaluate --dialogues {num_dialogues} --seed {seed}",
        "machine": {"cpu": _cpu(), "cores": os.cpu_count()},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "questions": questions,
        "greedy": {
            "tokens": len(player.margins),
            "share_with_margin_below_0.01": sum(m < CLOSE_CALL for m in player.margins) / len(player.margins),
            "smallest_margin": min(player.margins),
        },
        "bars": {name: dict(condition.bars) for name, condition in CONDITIONS.items()},
        "missed": missed,
    }


def main() -> int:
    """Evaluates, writes the report and says whether all bars were reached (exit code 0)."""
    parser = argparse.ArgumentParser(description="Judge the demo model on dialogues it has never seen.")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="Hugging Face folder")
    parser.add_argument("--dialogues", type=int, default=200, help="dialogues under each condition")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the report goes")
    arguments = parser.parse_args()
    report = evaluate(arguments.model, arguments.dialogues, arguments.seed)
    text = json.dumps(report, indent=2) + "\n"
    arguments.out.write_text(text)
    print(text)
    return 1 if report["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
