"""Which prompt gets how many tokens of a step, as plain numbers."""

from hypothesis import given
from hypothesis import strategies as st

from engine.step_budget import OLDEST_SHARE, Pacing, paced, shared

MISSING = st.lists(st.integers(1, 5000), min_size=1, max_size=20)
TOKENS = st.integers(0, 600)
SECONDS = st.floats(1e-6, 1e-2)


def test_a_short_turn_passes_a_long_one_which_keeps_its_quarter() -> None:
    assert shared(128, [4000, 100]) == [32, 96]
    assert shared(128, [3968, 4]) == [124, 4]


def test_equal_prompts_are_computed_one_after_the_other() -> None:
    assert shared(250, [100] * 4) == [100, 100, 50, 0]


def test_the_shortest_of_the_others_comes_first() -> None:
    assert shared(100, [1000, 90, 60, 70]) == [25, 0, 60, 15]


def test_nothing_is_shared_among_none() -> None:
    assert shared(100, []) == paced(Pacing(), 100, 0.01, [], []) == []


@given(TOKENS, MISSING)
def test_all_tokens_are_given_as_long_as_anybody_misses_any(num_tokens: int, missing: list[int]) -> None:
    chunks = shared(num_tokens, missing)
    assert sum(chunks) == min(num_tokens, sum(missing))
    assert all(0 <= chunk <= lacks for chunk, lacks in zip(chunks, missing, strict=True))
    assert chunks[0] >= min(missing[0], num_tokens / 4)


@given(st.integers(0, 600), st.floats(0, 1), MISSING, SECONDS, st.integers(1, 128), st.floats(1, 5))
def test_a_step_is_as_long_as_its_pace_allows(
    room: int, decode_s: float, missing: list[int], token_s: float, least: int, ratio: float
) -> None:
    costs = [token_s * (1 + i % 3) for i in range(len(missing))]
    chunks = paced(Pacing(ratio, least), room, decode_s, missing, costs)

    def added_s(chunks: list[int]) -> float:
        return sum(n * s for n, s in zip(chunks, costs, strict=True))

    num_tokens, most = sum(chunks), min(room, sum(missing))
    assert min(least, most) <= num_tokens <= most
    assert num_tokens == min(least, most) or added_s(chunks) <= (ratio - 1) * decode_s
    if num_tokens < most:
        assert added_s(shared(num_tokens + 1, missing)) > (ratio - 1) * decode_s, "one token more fits"


@given(
    st.integers(1, 200),
    st.integers(1, 5000),
    st.lists(st.lists(st.integers(1, 5000), max_size=3), max_size=40),
)
def test_whoever_arrives_later_the_oldest_prompt_is_computed_by_quarters_at_least(
    num_tokens: int, long: int, arrivals: list[list[int]]
) -> None:
    missing, bound = [long], -(-long // -(-num_tokens // OLDEST_SHARE))
    for step in range(bound):
        missing += arrivals[step % len(arrivals)] if arrivals else []
        chunks = shared(num_tokens, missing)
        missing = [lacks - chunk for lacks, chunk in zip(missing, chunks, strict=True)]
        if missing[0] == 0:
            return
        missing = [missing[0], *(lacks for lacks in missing[1:] if lacks)]
    raise AssertionError(f"{missing[0]} of {long} tokens are missing after {bound} steps")
