"""One instance of a simulated cluster: a queue, a batch, and steps that take time."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.simulation.cluster_memory import Memory
from engine.simulation.cluster_profiles import Instance
from engine.simulation.cluster_steps import Part, StepTime, step_time
from engine.simulation.cluster_workload import Request
from engine.simulation.network import Link
from engine.simulation.virtual_time import Agenda

BLOCK_SIZE = 32
WATERMARK = 0.01
"""Of a pool, free when a request begins: vLLM's block manager."""
COMING_HOME_ABOVE = 0.1
"""Of a pool, free and wanted by nobody."""
WAIT_S, STUCK_S, STUCK_ALONE_S, SHORTEST_S = 0.05, 2.0, 20.0, 1e-3


@dataclass(frozen=True, slots=True)
class Scheduling:
    max_rows: int = 256  # vLLM's default (max_num_seqs)
    max_step_tokens: int = 2048
    stride: int = 32  # decode steps that are simulated as one event
    moved_tokens_per_step: int = 16
    prefills: bool = True  # False: prompts are computed elsewhere and cost nothing here


FREE_MOVED_TOKENS, MOVED_SLOWDOWN, AT_MOVED_TOKENS = 16, 0.086, 32
"""Infinite-LLM: moving 16 tokens a step costs nothing, 32 cost 8.6 % of the throughput.  In between and
beyond, the same for each token more: an assumption.
"""


@dataclass(eq=False, slots=True)
class Row:
    request: Request
    computed: int = 0  # tokens whose KV there is
    generated: int = 0
    blocks: int = 0  # wherever they are
    is_running: bool = False

    @property
    def pending(self) -> int:
        """Tokens to be computed before the next one is generated; 1 while it decodes."""
        return self.request.prompt_tokens + self.generated - self.computed

    def lacks(self, num_tokens: int) -> int:
        """Blocks, to compute so many tokens more."""
        return max(0, -(-(self.computed + num_tokens) // BLOCK_SIZE) - self.blocks)


@dataclass(slots=True)
class Counters:
    steps: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0  # with requests and nothing to compute
    generated: int = 0
    served_s: float = 0.0  # of attention for others
    messages: int = 0
    wire_bytes: int = 0
    holder_layers: int = 0  # tokens x layers x holders that queries went out for
    preempted: int = 0
    lost: int = 0  # of those, because a creditor took back what it had lent
    finished: int = 0
    ended_s: float = 0.0  # the last of them


class VirtualRank:
    """Begins a step whenever it has none and there is something to do."""

    def __init__(
        self,
        number: int,
        instance: Instance,
        memory: Memory,
        agenda: Agenda,
        scheduling: Scheduling,
        link_to: Callable[[int], Link],
        admits: Callable[[Row, int, bool], bool] = lambda row, num_blocks, begins_short: True,
        begins_short_above: float = math.inf,
    ) -> None:
        """`admits`: there is room for a row that lacks so many blocks, here or, if it begins short, also
        elsewhere.  One that lacks more than `begins_short_above` may begin short.
        """
        self.number, self.instance, self.memory = number, instance, memory
        self.queue: deque[Row] = deque()
        self.rows: list[Row] = []
        self.counters = Counters()
        self.serve: Callable[[int, float], float] = lambda rank, seconds: 0.0  # see `serving`
        self.is_busy = False
        self._agenda, self._scheduling, self._admits = agenda, scheduling, admits
        self._link_to, self._begins_short_above = link_to, begins_short_above
        self._serving_until = 0.0
        self._owed_s = 0.0
        self._stuck_s = 0.0

    # -- asked by others

    def offer(self, request: Request) -> None:
        self.queue.append(Row(request))

    def serving(self, seconds: float) -> float:
        """So much attention over blocks that are kept here; returns when it will be done, after what is
        asked for already.  It takes as much time from this rank's own next step.
        """
        now = self._agenda.now
        self._serving_until = max(now, self._serving_until) + seconds
        self._owed_s += seconds
        self.counters.served_s += seconds
        return self._serving_until

    def drop(self, conversation: int) -> None:
        """Some of its KV is lost: it is computed again."""
        for row in self.rows:
            if row.request.number == conversation:
                self._preempt(row)
                self.counters.lost += 1
                return

    def wake(self) -> None:
        if not self.is_busy:
            self._owed_s = min(self._owed_s, max(0.0, self._serving_until - self._agenda.now))
            self._begin()

    # -- private

    def _begin(self) -> None:
        if self.is_busy:
            return
        self._admit()
        if self.memory.can_borrow and self.rows:
            self._look_ahead()
        decoding = [row for row in self.rows if row.pending == 1]
        filling = [row for row in self.rows if row.pending > 1]
        num_steps = 1 if filling else self._stride(decoding)
        parts = self._grown([(row, num_steps) for row in decoding])
        if filling:
            kept = [row for row in filling if row in self.rows]  # others made room
            parts += self._chunks(kept, self._scheduling.max_step_tokens - len(parts))
        if parts:
            self._compute(parts, num_steps, bool(filling))
        elif self.rows or self.memory.num_moving:
            self._wait()

    def _look_ahead(self) -> None:
        """Room for what the next strides write is asked for before it is lacking; blocks that are elsewhere
        come home while nobody waits for the room.
        """
        soon = 2 * len(self.rows)
        if self.memory.num_free < soon:
            self._ask(soon)
        elif not self.queue and self.memory.num_free > soon + COMING_HOME_ABOVE * self.memory.num_blocks:
            self.memory.bring_home((self.memory.num_free - soon) // 2)

    def _ask(self, num_blocks: int) -> bool:
        """For room, in which blocks of the longest conversation may go elsewhere."""
        longest = max(self.rows, key=lambda row: row.computed)
        return self.memory.ask_for_room(longest.request.number, num_blocks)

    def _compute(self, parts: list[tuple[Row, int]], num_steps: int, is_filling: bool) -> None:
        now, scheduling = self._agenda.now, self._scheduling
        free_of_charge = 0 if scheduling.prefills else sum(num > num_steps for _, num in parts)
        charged = parts[: len(parts) - free_of_charge]  # prompts come last
        time = self._time(charged, num_steps)
        taken = time.seconds
        for rank, seconds in time.service_s.items():
            taken = max(taken, self.serve(rank, seconds) - now)
        moved = scheduling.moved_tokens_per_step
        if self.memory.num_moving and moved > FREE_MOVED_TOKENS:
            beyond = (moved - FREE_MOVED_TOKENS) / (AT_MOVED_TOKENS - FREE_MOVED_TOKENS)
            taken /= max(0.1, 1.0 - MOVED_SLOWDOWN * beyond)
        taken += self._owed_s
        self._owed_s = 0.0
        move_tokens: float = num_steps * moved
        if (
            is_filling
        ):  # a prompt goes on only as its KV finds room, so that may move as fast as it is computed
            move_tokens = max(moved, scheduling.max_step_tokens) if scheduling.prefills else math.inf
        self.counters.steps += num_steps
        self.is_busy = True
        self._agenda.after(max(taken, SHORTEST_S), lambda: self._end(parts, taken, move_tokens))

    def _time(self, parts: list[tuple[Row, int]], num_steps: int) -> StepTime:
        """Of all steps of a stride: as many times the one in its middle."""
        half = (num_steps - 1) // 2
        asked, links = [], {}
        for row, num in parts:
            remote = {rank: n * BLOCK_SIZE for rank, n in self.memory.remote(row.request.number).items()}
            for rank in remote:
                links[rank] = self._link_to(rank)
            num_new = 1 if num_steps > 1 else num
            self.counters.holder_layers += num * len(remote) * self.instance.costs.num_layers
            asked.append(Part(num_new, row.computed + (1 + half if num_steps > 1 else num), remote))
        if not asked:
            return StepTime()
        time = step_time(self.instance, asked, links)
        self.counters.messages += num_steps * time.messages
        self.counters.wire_bytes += num_steps * time.wire_bytes
        services = {rank: num_steps * seconds for rank, seconds in time.service_s.items()}
        return StepTime(num_steps * time.seconds, services)

    def _end(self, parts: list[tuple[Row, int]], taken: float, move_tokens: float) -> None:
        self.is_busy = False
        self.counters.busy_s += taken
        alive = set(map(id, self.rows))
        for row, num_tokens in parts:
            if id(row) not in alive:
                continue  # its KV was lost meanwhile
            generated = num_tokens if row.pending == 1 else int(num_tokens == row.pending)
            row.computed += num_tokens
            row.generated += generated
            self.counters.generated += generated
            if row.generated >= row.request.reply_tokens:
                self._leave(row)
                self.counters.finished += 1
                self.counters.ended_s = self._agenda.now
        self.memory.move(move_tokens, taken)
        self._begin()

    def _wait(self) -> None:
        """For room, with nothing to compute: what moves may take the whole link.  When nothing has moved for
        long, the youngest makes room.
        """
        self.is_busy = True
        is_moving = self.memory.num_moving > 0
        self._stuck_s = 0.0 if is_moving else self._stuck_s + WAIT_S
        if self._stuck_s > (STUCK_S if len(self.rows) > 1 else STUCK_ALONE_S) and self.rows:
            self._preempt(self.rows[-1])
            self._stuck_s = 0.0

        def over() -> None:
            self.is_busy = False
            self.counters.waited_s += WAIT_S
            self.memory.move(float("inf"), WAIT_S)
            self._begin()

        self._agenda.after(WAIT_S, over)

    def _stride(self, decoding: list[Row]) -> int:
        """Steps until the first row ends, at most."""
        left = [row.request.reply_tokens - row.generated for row in decoding]
        return max(1, min(self._scheduling.stride, *left)) if left else 1

    def _grown(self, parts: list[tuple[Row, int]]) -> list[tuple[Row, int]]:
        """Those that have room for what they compute; oldest first: the youngest makes room."""
        grown = []
        for row, num_tokens in parts:
            if row in self.rows and self._grow(row, num_tokens):
                grown.append((row, num_tokens))
        alive = set(map(id, self.rows))
        return [(row, num_tokens) for row, num_tokens in grown if id(row) in alive]

    def _grow(self, row: Row, num_tokens: int) -> bool:
        """Room elsewhere comes first, then that of the youngest here; what is lent comes back last, as its
        debtor may have to compute it again.
        """
        needed, number = row.lacks(num_tokens), row.request.number
        while needed and not self.memory.grow(number, needed):
            lacking = needed - self.memory.num_free
            if self._ask(lacking):
                return False
            youngest = self.rows[-1]
            if len(self.rows) == 1:
                self.memory.recall(lacking)
                return False
            self._preempt(youngest)
            if youngest is row:
                return False
        row.blocks += needed
        return True

    def _chunks(self, filling: list[Row], num_tokens: int) -> list[tuple[Row, int]]:
        """Of prompts, in order, as far as the step and the room at home go."""
        chunks: list[tuple[Row, int]] = []
        for row in filling:
            lacking = row.lacks(row.pending) - self.memory.num_free
            if lacking > 0:
                self._ask(lacking)
            room = (row.blocks + self.memory.num_free) * BLOCK_SIZE - row.computed
            most = num_tokens if self._scheduling.prefills else row.pending
            length = min(row.pending, most, room)
            if length < 2:
                continue  # no room yet; one token alone would be taken for a row that decodes
            needed = row.lacks(length)
            if needed:
                self.memory.grow(row.request.number, needed)
                row.blocks += needed
            chunks.append((row, length))
            num_tokens -= length
        return chunks

    def _admit(self) -> None:
        """In order.  A prompt takes its room at once, unless it begins without."""
        memory = self.memory
        while self.queue and len(self.rows) < self._scheduling.max_rows:
            row = self.queue[0]
            needed = row.lacks(row.pending)
            fits = needed <= memory.num_free - int(WATERMARK * memory.num_blocks)
            begins_short = (
                not fits
                and needed > self._begins_short_above
                and memory.num_free * BLOCK_SIZE >= self._scheduling.max_step_tokens
            )
            if not (fits or begins_short) or not self._admits(row, needed, begins_short):
                return
            if fits:
                memory.grow(row.request.number, needed)
                row.blocks = needed
            self.queue.popleft()
            row.is_running = True
            self.rows.append(row)
            self.rows.sort(key=lambda each: each.request.number)

    def _preempt(self, row: Row) -> None:
        self._leave(row)
        row.computed = 0
        self.queue.appendleft(row)
        self.counters.preempted += 1

    def _leave(self, row: Row) -> None:
        self.rows.remove(row)
        self.memory.release(row.request.number)
        row.blocks = 0
        row.is_running = False
