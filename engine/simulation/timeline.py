"""When a step ends on a device that does one after the other."""

from typing import Protocol

from engine.batch import StepPlan
from engine.simulation.profiles import COPIES_SLOW_EACH_OTHER
from engine.simulation.step_costs import StepCosts


class Timeline(Protocol):
    def launch(self, plan: StepPlan, now: float) -> float:
        """When the step ends that is launched now, behind all before it."""
        ...


class CopiesFirst:
    """Stores, loads and computation one after the other, as `SyncTransfer` has it."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._free_at = 0.0

    def launch(self, plan: StepPlan, now: float) -> float:
        seconds = self._costs.compute_s(plan)
        if plan.stores or plan.loads:
            seconds += sum(self._costs.copies_s(len(plan.stores), len(plan.loads)))
        self._free_at = max(self._free_at, now) + seconds
        return self._free_at


class CopiesBeside:
    """One queue for each way and one for computation.  A layer begins when what it needs has been loaded; a
    slot that is being stored is written when that has ended, and nothing else waits for stores.
    """

    def __init__(self, costs: StepCosts, block_size: int) -> None:
        self._costs, self._block_size = costs, block_size
        self._free_at = self._loaded_at = self._stored_at = 0.0
        self._storing: dict[int, float] = {}  # device block -> when it has been stored

    def launch(self, plan: StepPlan, now: float) -> float:
        compute_s = self._costs.compute_s(plan)
        begin = max(self._free_at, now)
        if plan.stores or plan.loads or self._storing:
            self._free_at = self._among_copies(plan, now, begin, compute_s)
        else:
            self._free_at = begin + compute_s
        return self._free_at

    def _among_copies(self, plan: StepPlan, now: float, begin: float, compute_s: float) -> float:
        costs = self._costs
        stores_s, loads_s = costs.copies_s(len(plan.stores), len(plan.loads))
        if plan.stores:
            at = max(self._stored_at, now) + costs.copy_latency_s
            for number, move in enumerate(plan.stores, 1):
                self._storing[move.device_slot] = at + number * costs.store_s
            self._stored_at = max(self._stored_at, now) + stores_s
        begin = max(begin, self._written_from(plan, now))
        if not plan.loads:
            return begin + compute_s
        load = max(self._loaded_at, now, self._stored_from(plan, now))
        both_s = min(max(self._stored_at - load, 0.0), loads_s) * (COPIES_SLOW_EACH_OTHER - 1)
        loads_s += both_s
        self._stored_at += both_s
        self._loaded_at = load + loads_s
        first_layer = max(begin, load + loads_s / costs.num_layers)
        return max(first_layer + compute_s, self._loaded_at + compute_s / costs.num_layers)

    def _stored_from(self, plan: StepPlan, now: float) -> float:
        """When the slots can be written that the plan loads into."""
        return max((self._storing.get(move.device_slot, now) for move in plan.loads), default=now)

    def _written_from(self, plan: StepPlan, now: float) -> float:
        """When the slots can be written that the plan's segments write to."""
        self._storing = {slot: at for slot, at in self._storing.items() if at > now}
        size, storing, latest = self._block_size, self._storing, now
        if not storing:
            return now
        for segment in plan.segments:
            end = segment.first + segment.length
            for slot in segment.slots[segment.first // size : -(-end // size)].tolist():
                latest = max(latest, storing.get(slot, now))
        return latest


def timeline_of(costs: StepCosts, block_size: int) -> Timeline:
    return CopiesBeside(costs, block_size) if costs.overlaps else CopiesFirst(costs)
