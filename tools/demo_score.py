"""What the two runs of the demo came to: the scoreboard, the line of JSON, and what must not happen."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from tools.demo_play import Cast, Exchange, Speaker

WANTED_RECALL = 0.95


@dataclass(frozen=True)
class Score:
    kept: Cast
    control: list[Speaker]  # asked what nobody told them
    resent: Cast  # the same script, the history sent again every turn
    comparable: list[int]  # of each speaker's turns, how many have the same history in both
    cut_off_turns: int  # by the kill; what their first attempts computed died with the server
    judged: bool  # whether the model was trained for this: recall and equality are then required
    seconds: float

    def figures(self) -> dict[str, int | float]:
        turns = self.kept.exchanges
        usage = [exchange.turn.usage for exchange in turns]
        asked, asked_again = (
            [exchange for exchange in run.exchanges if exchange.asks_for_a_fact]
            for run in (self.kept, self.resent)
        )
        control = [exchange for speaker in self.control for exchange in speaker.exchanges]
        return {
            "turns": len(turns),
            "conversations": len(self.kept.everybody),
            "prompt_tokens": sum(u.prompt_tokens for u in usage),
            "cached_device_tokens": sum(u.cached_device_tokens for u in usage),
            "cached_host_tokens": sum(u.cached_host_tokens for u in usage),
            "recomputed_tokens": sum(u.recomputed_tokens for u in usage),
            "computed_tokens": _computed(turns),
            "stateless_computed_tokens": _computed(self.resent.exchanges),
            "kills": 1,
            "cut_off_turns": self.cut_off_turns,
            "recall_asked": len(asked),
            "recall_correct": sum(exchange.is_right for exchange in asked),
            "stateless_recall_correct": sum(exchange.is_right for exchange in asked_again),
            "control_asked": len(control),
            "control_not_told": sum(exchange.says_not_told for exchange in control),
            "compared_turns": sum(self.comparable),
            "equal_turns": sum(
                ours.turn.token_ids == theirs.turn.token_ids for ours, theirs in self._pairs()
            ),
            "ttft_first_ms": _ttft_ms(self.kept, 0),
            "ttft_last_ms": _ttft_ms(self.kept, -1),
            "stateless_ttft_first_ms": _ttft_ms(self.resent, 0),
            "stateless_ttft_last_ms": _ttft_ms(self.resent, -1),
            "seconds": round(self.seconds, 1),
        }

    def _pairs(self) -> Iterator[tuple[Exchange, Exchange]]:
        """The comparable turns of both runs."""
        for ours, theirs, num in zip(
            self.kept.everybody, self.resent.everybody, self.comparable, strict=True
        ):
            yield from zip(ours.exchanges[:num], theirs.exchanges[:num], strict=True)

    def rows(self) -> list[tuple[str, str, str]]:
        f = self.figures()
        num_turns = len(self.kept.friends[0].steps)
        return [
            ("tokens computed", f"{f['computed_tokens']:,}", f"{f['stateless_computed_tokens']:,}"),
            ("first token of turn 1", _ms(f["ttft_first_ms"]), _ms(f["stateless_ttft_first_ms"])),
            (f"first token of turn {num_turns}", _ms(f["ttft_last_ms"]), _ms(f["stateless_ttft_last_ms"])),
            ("answers equal", f"{f['equal_turns']}/{f['compared_turns']}", "the yardstick"),
            (
                "facts right",
                f"{f['recall_correct']}/{f['recall_asked']}",
                f"{f['stateless_recall_correct']}/{f['recall_asked']}",
            ),
        ]

    def failures(self) -> list[str]:
        """What went wrong, each as a sentence."""
        if not self.judged:
            return []
        f = self.figures()
        failures = []
        if f["recall_correct"] < WANTED_RECALL * f["recall_asked"]:
            failures.append(f"Only {f['recall_correct']} of {f['recall_asked']} facts came back right.")
        if f["equal_turns"] < f["compared_turns"]:
            failures.append(f"{f['compared_turns'] - f['equal_turns']} answers differ between the two runs.")
        if f["control_not_told"] < f["control_asked"]:
            failures.append(
                f"{f['control_asked'] - f['control_not_told']} answers claim to know what nobody had told."
            )
        return failures


def _computed(exchanges: list[Exchange]) -> int:
    return sum(exchange.computed_tokens for exchange in exchanges)


def _ttft_ms(cast: Cast, turn: int) -> float:
    """Of the friends' first or last turn, the median."""
    return round(1000 * median(friend.exchanges[turn].ttft_s for friend in cast.friends), 1)


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"
