"""The part of a history that a turn needs under sliding windows, against every dependency there is."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.needed import first_needed

SIZE = 4


def needed_by_layers(held: list[int], num_tokens: int, window: int, num_layers: int) -> set[int]:
    """The positions that must have KV, by following every key of every layer from the last position's
    output.  One that has none is computed in all layers, and so is what stands before it in its block.
    """
    has_kv = {block * SIZE + i for block, count in enumerate(held) for i in range(count)}
    has_kv.discard(num_tokens - 1)
    needed: set[int] = set()
    done: set[tuple[int, int]] = set()
    todo = [(num_tokens - 1, num_layers)]  # (position, layer): the hidden state that enters the layer
    while todo:
        position, layer = todo.pop()
        if (position, layer) in done:
            continue
        done.add((position, layer))
        if layer == 0:
            continue
        todo.append((position, layer - 1))
        for key in range(max(0, position - window + 1), position + 1):
            if key in needed:
                continue
            needed.add(key)
            if key not in has_kv:
                first = key // SIZE * SIZE + held[key // SIZE] if key < num_tokens - 1 else key
                todo += [(again, num_layers) for again in range(min(first, key), key + 1)]
    return needed


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], int]:
    num_tokens = draw(st.integers(1, 60))
    whole = draw(st.lists(st.sampled_from([0, 0, 1, 3, 4, 4, 4, 4]), min_size=16, max_size=16))
    shares = [min(SIZE, num_tokens - start) for start in range(0, num_tokens, SIZE)]
    return [min(pair) for pair in zip(whole, shares, strict=False)], num_tokens


@settings(max_examples=1500, deadline=None)
@given(histories(), st.integers(1, 25), st.integers(1, 4))
def test_exactly_the_blocks_are_needed_that_some_layer_of_some_computed_position_attends_to(
    history: tuple[list[int], int], window: int, num_layers: int
) -> None:
    held, num_tokens = history
    needed = needed_by_layers(held, num_tokens, window, num_layers)
    assert needed == set(range(min(needed), num_tokens))
    first = first_needed(np.array(held), num_tokens, SIZE, window)
    assert first == min(needed) // SIZE


def test_a_whole_window_ends_it_and_a_hole_in_it_reaches_further_back() -> None:
    held = np.array([4, 0, 4, 4, 4, 4, 4, 3])
    assert first_needed(held, 32, SIZE, window=9) == 5
    held[6] = 0
    assert first_needed(held, 32, SIZE, window=9) == 4
    assert first_needed(held, 32, SIZE, window=18) == 0, (
        "the hole in block 1 is in sight, and so is the beginning"
    )


def test_without_any_kv_all_of_it_is_needed() -> None:
    assert first_needed(np.zeros(16, np.int64), 64, SIZE, window=2) == 0


def test_a_window_of_one_needs_only_what_is_computed() -> None:
    assert first_needed(np.array([0, 0, 0, 3]), 16, SIZE, window=1) == 3
