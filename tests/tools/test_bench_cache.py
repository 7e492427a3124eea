"""The tool that measures the cache manager, on a small scale; what its figures say of memory holds at any."""

from tools.bench_cache import BOUNDS, _memory, _speed


def test_what_an_idle_conversation_takes_up_is_bounded() -> None:
    figures = _memory(num_idle=600)
    assert 0 < figures["bytes_per_block"] <= BOUNDS["bytes_per_block"]
    assert 500 < figures["bytes_per_conversation"] <= BOUNDS["bytes_per_conversation"]


def test_steps_are_planned_while_blocks_leave_and_come_back() -> None:
    figures = _speed(num_idle=60, num_running=8, num_steps=300)
    assert figures["blocks_chosen"] > 100 and figures["blocks_loaded"] > 50
    assert 0 < figures["decode_plan_ms"] <= figures["plan_p99_ms"]
