"""What is measured, where, and for how long; and that no figures of something else count as one's own."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch

import engine.profile
from engine.batch import Collect, StepPlan, StepResult
from engine.cache.block import BlockMove
from engine.cache.costs import MeasuredCosts
from engine.cache.kv_store import KVStore
from engine.cost_profile import FORMAT, Profile, Subject, _digest, processor, read_profile, write_profile
from engine.errors import ConfigError
from engine.profile import RUN, Effort, Profiler

SIZE = 16
NUM_BLOCKS = 80
EFFORT = Effort(budget_s=60.0, repeats=3, step=2, num_bytes=1 << 40, num_copied=(1, 4, 16))
SUBJECT = Subject("0123456789abcdef", "cpu", "bfloat16", 2, 32, "Some CPU", "native AVX2", "1.0")
COSTS = MeasuredCosts({128: 0.017, 256: 0.018, 1024: 0.021}, {1: 0.0002, 16: 0.0001}, {1: 0.0003}, 0.04)
PROFILE = Profile(SUBJECT, 1_800_000_000, 0.25, COSTS)


class Clock:
    """Time that passes only where something takes it, and a little at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    Machine.clock = Clock()
    monkeypatch.setattr(engine.profile, "time", Machine.clock)
    return Machine.clock


class Machine:
    """Runs and copies, and looks at what it is given.  Both take their time until they are waited for, as a
    GPU's do: a step `read_s` per block that it reads, a store `store_s` per block.
    """

    clock: Clock

    def __init__(
        self,
        num_blocks: int = NUM_BLOCKS,
        num_host_blocks: int = 40,
        read_s: float = 0.0,
        store_s: float = 0.0,
    ) -> None:
        self.store_ = KVStore(2, num_blocks, 1, SIZE, 8, torch.float32)
        self.num_host_blocks = num_host_blocks
        self.read_s, self.store_s = read_s, store_s
        self.plans: list[StepPlan] = []
        self.loads: list[list[BlockMove]] = []
        self.under_way: float | None = None  # seconds that remain of what has begun

    def launch(self, plan: StepPlan) -> Collect:
        (segment,) = plan.segments
        num_before = segment.first // SIZE
        for slot in segment.slots[:num_before]:
            assert self.store_.slab[:, slot].all(), f"slot {slot} is attended and holds nothing"
        for slot in segment.slots[num_before:]:
            self.store_.slab[:, slot] = 1.0
        assert len(set(segment.slots[num_before:])) == len(segment.slots[num_before:])
        self.plans.append(plan)
        self.begin(self.read_s * len(segment.slots))

        def collect() -> StepResult:
            self.end()
            return StepResult()

        return collect

    def begin(self, seconds: float) -> None:
        assert self.under_way is None, "one at a time is measured"
        self.under_way = seconds

    def end(self) -> None:
        assert self.under_way is not None
        self.clock.now += self.under_way
        self.under_way = None

    def store(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        self.begin(self.store_s * len(moves))
        return frozenset()

    def load(self, moves: Sequence[BlockMove]) -> "Machine":
        assert self.under_way is not None, "stores of a step come before its loads"
        assert all(move.host_slot < self.num_host_blocks for move in moves)
        assert all(move.device_slot < self.store_.slab.shape[1] for move in moves)
        if moves:
            self.loads.append(list(moves))
        self.layers_waited_for = 0 if moves else len(self.store_.layers)
        return self

    def wait_for(self, layer: int) -> None:
        assert layer == self.layers_waited_for, "layers are waited for in order"
        self.layers_waited_for += 1

    def finish(self) -> frozenset[BlockMove]:
        assert self.layers_waited_for == len(self.store_.layers), "a load is timed as a step makes it"
        self.end()
        return frozenset()

    def profiler(
        self, context_tokens: int, *, with_host: bool = True, max_step_tokens: int = 512
    ) -> Profiler:
        transfer, limits = self if with_host else None, (SIZE, context_tokens, max_step_tokens)
        return Profiler(self, self.store_, transfer, self.num_host_blocks, *limits)  # type: ignore[arg-type]


# -- measuring


def test_a_few_blocks_are_computed_at_every_power_of_two_up_to_the_context() -> None:
    machine = Machine()
    costs = machine.profiler(context_tokens=1200).measure(EFFORT)
    assert list(costs.compute_s) == [64, 128, 256, 512, 1024]
    assert {(plan.segments[0].first, plan.segments[0].length) for plan in machine.plans} == {
        (end - RUN * SIZE, RUN * SIZE) for end in costs.compute_s
    }


def test_costs_are_per_block_and_grow_with_what_is_attended_to() -> None:
    costs = Machine(read_s=0.0005).profiler(context_tokens=512).measure(EFFORT)
    assert costs.compute_s[64] == pytest.approx(0.0005, rel=0.01)  # 4 blocks in 2 ms
    assert costs.compute_s[512] == pytest.approx(0.0040, rel=0.01)  # 4 blocks in 16 ms
    assert costs.table().compute_s(288) == pytest.approx(
        (costs.compute_s[256] * 7 + costs.compute_s[512]) / 8
    )


@pytest.mark.parametrize("context_tokens", [5, 16, 40, 64])
def test_a_short_context_is_measured_at_its_end(context_tokens: int) -> None:
    machine = Machine(num_blocks=5, read_s=0.002)
    costs = machine.profiler(context_tokens).measure(EFFORT)
    assert list(costs.compute_s) == [context_tokens]
    num_blocks = -(-context_tokens // SIZE)
    assert costs.compute_s[context_tokens] == pytest.approx(
        0.002 * num_blocks * SIZE / context_tokens, rel=0.01
    )


@pytest.mark.parametrize(("max_step_tokens", "length"), [(7, 7), (16, 16), (40, 32), (1000, RUN * SIZE)])
def test_no_run_is_larger_than_a_step_may_be(max_step_tokens: int, length: int) -> None:
    machine = Machine()
    costs = machine.profiler(512, max_step_tokens=max_step_tokens).measure(EFFORT)
    assert {plan.segments[0].length for plan in machine.plans} == {length}
    assert min(costs.compute_s) == length


def test_what_is_attended_to_holds_kv_in_no_more_memory_than_allowed() -> None:
    """`Machine.launch` looks at every block that is attended to."""
    machine = Machine()
    per_block = machine.store_.slab[:, 0].nbytes
    costs = machine.profiler(1200).measure(replace(EFFORT, num_bytes=20 * per_block, num_copied=(4,)))
    assert 1024 in costs.compute_s
    written = {slot for slot in range(NUM_BLOCKS) if machine.store_.slab[:, slot].any()}
    assert written | {move.device_slot for move in chain(*machine.loads)} == set(range(20))
    longest = max((plan.segments[0].slots for plan in machine.plans), key=len)
    assert len(longest) == 64 and set(longest) == set(range(20))


def test_with_patience_every_block_that_is_attended_to_is_memory_of_its_own() -> None:
    machine = Machine()
    machine.profiler(1200).measure(EFFORT)
    longest = max((plan.segments[0].slots for plan in machine.plans), key=len)
    assert len(set(longest)) == len(longest) == 64


def test_no_position_is_tried_that_the_budget_has_no_time_for(clock: Clock) -> None:
    machine = Machine(read_s=0.002)
    costs = machine.profiler(1200).measure(replace(EFFORT, budget_s=0.15))
    assert clock.now < 0.4  # 3 x 128 ms for the last position alone, without a budget
    assert 64 in costs.compute_s and 1024 not in costs.compute_s
    assert costs.table().compute_s(1024) > costs.table().compute_s(64)


def test_copies_go_through_memory_that_was_touched_before_but_not_just_now() -> None:
    machine = Machine()
    costs = machine.profiler(1200).measure(EFFORT)
    assert set(costs.load_s) == set(costs.store_s) == {1, 4, 16}
    everything, *timed = machine.loads
    assert all(set(moves) <= set(everything) for moves in timed)
    for before, after in pairwise(timed):
        if len(before) == len(after) < 16:
            assert not set(before) & set(after)


def test_a_store_is_timed_to_its_end() -> None:
    costs = Machine(store_s=0.005).profiler(64).measure(replace(EFFORT, num_copied=(1, 4)))
    assert costs.store_s == pytest.approx({1: 0.005, 4: 0.005}, rel=0.01)
    assert max(costs.load_s.values()) < 0.0001


@pytest.mark.parametrize(("num_host_blocks", "sizes"), [(1, {1}), (3, {1, 3}), (40, {1, 4, 16})])
def test_a_small_host_tier_is_copied_from_as_far_as_it_goes(num_host_blocks: int, sizes: set[int]) -> None:
    machine = Machine(num_host_blocks=num_host_blocks)
    assert set(machine.profiler(1200).measure(EFFORT).load_s) == sizes


def test_without_a_host_tier_nothing_is_copied() -> None:
    costs = Machine().profiler(1200, with_host=False).measure(EFFORT)
    assert (costs.load_s, costs.store_s, costs.table().load_s) == ({}, {}, 0.0)


def test_a_reload_counts_as_one_of_many() -> None:
    assert COSTS.table().load_s == 0.0001


# -- the file


def written(tmp_path: Path, profile: Profile = PROFILE) -> Path:
    path = tmp_path / "not yet there" / "profile.json"
    write_profile(profile, path)
    return path


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read_profile(path, SUBJECT) == PROFILE
    assert [each.name for each in path.parent.iterdir()] == ["profile.json"]


def test_every_byte_that_changes_or_is_missing_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for i in range(len(whole) - 2):  # behind the last brace there is only the end of the line
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]):
            path.write_bytes(damaged)
            try:
                read = read_profile(path, SUBJECT)
            except ConfigError as error:
                assert str(path) in str(error) and "measure again with `continuo profile`" in str(error)
            else:  # white space, or another way to write the same
                assert read == PROFILE


def resealed(path: Path, **changes: object) -> None:
    """The file with other content, and the checksum that belongs to it."""
    content = json.loads(path.read_text()) | changes
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": _digest(content)}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": FORMAT + 1}, f"its format is {FORMAT + 1}, and this program reads {FORMAT}"),
        ({"costs": None}, "it is damaged: TypeError"),
        ({"subject": {"model": "x"}}, "it is damaged: TypeError"),
    ],
)
def test_another_format_or_shape_is_refused(
    tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    path = written(tmp_path)
    resealed(path, **changes)
    with pytest.raises(ConfigError, match=complaint):
        read_profile(path, SUBJECT)


@pytest.mark.parametrize("impossible", [{}, {"128": 0}, {"128": -1.0}, {"128": float("nan")}, {"128": 1e999}])
@pytest.mark.parametrize("name", ["compute_s", "load_s", "store_s"])
def test_impossible_costs_are_refused(tmp_path: Path, name: str, impossible: dict[str, float]) -> None:
    path = written(tmp_path)
    resealed(path, costs=json.loads(path.read_text())["costs"] | {name: impossible})
    with pytest.raises(ConfigError, match="it holds impossible costs"):
        read_profile(path, SUBJECT)


@pytest.mark.parametrize(
    ("content", "complaint"), [("", "it is damaged"), ("[]", "no profile"), ('{"figures": 1}', "no profile")]
)
def test_a_file_of_something_else_is_no_profile(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        read_profile(path, SUBJECT)


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("model", "fedcba9876543210"),
        ("device", "cuda"),
        ("machine", "NVIDIA H200, capability 9.0, beside Some CPU"),
        ("dtype", "float32"),
        ("threads", 8),
        ("block_size", 64),
        ("machine", "Another CPU"),
        ("kernels", "torch (asked for)"),
        ("version", "0.9"),
    ],
)
def test_a_profile_of_something_else_is_refused_with_what_differs(
    tmp_path: Path, field: str, theirs: object
) -> None:
    other = replace(SUBJECT, **{field: theirs})  # type: ignore[arg-type]
    path = written(tmp_path, replace(PROFILE, subject=other))
    what, ours = field.replace("_", " "), getattr(SUBJECT, field)
    with pytest.raises(ConfigError) as refused:
        read_profile(path, SUBJECT)
    assert f"the profile {path} is of {what} {theirs}, and this is {ours}" in str(refused.value)
    same_place = field in ("kernels", "version")  # outdated: the next measurement takes its place
    assert (other.file_name == SUBJECT.file_name) == same_place


def test_a_profile_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to .*/file/profile.json: "):
        write_profile(PROFILE, tmp_path / "file" / "profile.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be written to .*/folder.json: "):
        write_profile(PROFILE, tmp_path / "folder.json")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("seconds", "age"),
    [(-60, "today"), (86399, "today"), (86400, "1 day ago"), (30 * 86400, "30 days ago")],
)
def test_an_age_is_told_in_days(seconds: int, age: str) -> None:
    assert PROFILE.age(PROFILE.measured_at + seconds) == age


def test_a_machine_goes_by_its_processor_or_else_its_kind(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9B45\nmodel name\t: other\n")
    assert processor(tmp_path / "cpuinfo") == "AMD EPYC 9B45"
    assert processor(tmp_path / "none") in ("x86_64", "aarch64", "arm64")
