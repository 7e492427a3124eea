"""What a table holds, and where: the questions that are asked before anything is moved or computed."""

import numpy as np
from numpy.typing import NDArray

from engine.cache.block import LOADING, NO_SLOT, NOT_COPIED, BlockIds, Blocks
from engine.cache.block_table import BlockTable
from engine.cache.needed import first_needed
from engine.cache.tiers import Tiers


class Holdings:
    """`window`: the most positions that a row sees in any layer, itself included; None if some layer sees all
    that come before.
    """

    def __init__(self, blocks: Blocks, tiers: Tiers, block_size: int, window: int | None) -> None:
        self._blocks, self._tiers = blocks, tiers
        self._block_size, self._window = block_size, window

    def is_loading(self, table: BlockTable) -> bool:
        """Some of it is on its way from the host."""
        return bool((self._blocks.copying[table.blocks] == LOADING).any())

    def needed_from(self, table: BlockTable, num_tokens: int) -> int:
        """The number of the first block that computing the last of `num_tokens` tokens needs now."""
        if self._window is None or num_tokens <= self._window:
            return 0
        size = self._block_size
        num_blocks = -(-num_tokens // size)
        ids = table.blocks[:num_blocks]
        held = np.zeros(num_blocks, np.int64)  # of the last one the tokens may not be known yet
        loaded = np.where(self._worth_loading(ids, 0), self._tiers.reloadable(ids), 0)
        held[: len(ids)] = np.maximum(self._blocks.num_scheduled[ids], loaded)
        return first_needed(held, num_tokens, size, self._window)

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Slots that `table` lacks to hold what computing the last of `num_tokens` tokens needs."""
        first = self.needed_from(table, num_tokens)
        have = int(np.count_nonzero(self._blocks.slot[table.blocks[first:]] != NO_SLOT))
        return -(-num_tokens // self._block_size) - first - have

    def num_own(self, table: BlockTable) -> int:
        """Device slots of an idle `table` that could be made free."""
        ids = table.blocks
        return int(np.count_nonzero(self._tiers.idle.are(ids) & (self._blocks.slot[ids] != NO_SLOT)))

    def num_scheduled(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens have KV on the device, or will when every planned step
        has ended, or need none.
        """
        first = self.needed_from(table, num_tokens)
        ids = table.blocks[: -(-num_tokens // self._block_size)]
        tokens = np.minimum(self._blocks.num_scheduled[ids], self._shares(len(ids), num_tokens))
        return first * self._block_size + int(tokens[first:].sum())

    def num_to_compute(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens are to be computed so that the last of them can be."""
        first = self.needed_from(table, num_tokens)
        ids = table.blocks[first : -(-num_tokens // self._block_size)]
        shares = self._shares(first + len(ids), num_tokens)[first:]
        there = np.where(self._worth_loading(ids, first), self._tiers.reloadable(ids), 0)
        return int((shares - np.minimum(np.maximum(self._blocks.num_scheduled[ids], there), shares)).sum())

    def num_cached(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens need neither be computed nor be copied: as
        `num_scheduled`, without what is on its way from the host or came from there for the turn that waits.
        """
        ids = table.blocks[: -(-num_tokens // self._block_size)]
        tokens = np.minimum(self._blocks.num_scheduled[ids], self._shares(len(ids), num_tokens))
        return int(tokens[~self._from_host(table, ids)].sum())

    def num_reloadable(self, table: BlockTable, num_tokens: int, first: int = 0) -> int:
        """How many of the first `num_tokens` tokens need not be computed because they are, or were when the
        turn was accepted, on the host.  Nothing before block `first` begins to be loaded any more.
        """
        ids = table.blocks[: -(-num_tokens // self._block_size)]
        shares = self._shares(len(ids), num_tokens)
        came = np.where(self._from_host(table, ids), np.minimum(self._blocks.num_scheduled[ids], shares), 0)
        there = np.minimum(self._tiers.reloadable(ids), shares)
        there[~self._worth_loading(ids, 0)] = 0
        there[:first][self._blocks.copying[ids[:first]] != LOADING] = 0
        return int(np.maximum(came, there).sum())

    def num_unseen(self, table: BlockTable, num_tokens: int, first: int) -> int:
        """How many of the first `num_tokens` tokens have no KV on the device and need none, because they are
        before block `first`, where all that is needed begins.
        """
        if not first:
            return 0
        end = min(num_tokens, first * self._block_size)
        return end - self.num_cached(table, end) - self.num_reloadable(table, end, first)

    def _shares(self, num_blocks: int, num_tokens: int) -> NDArray[np.int64]:
        """Of the first `num_tokens` tokens, how many are in each block."""
        return np.minimum(num_tokens - np.arange(num_blocks) * self._block_size, self._block_size)

    def _from_host(self, table: BlockTable, ids: BlockIds) -> NDArray[np.bool_]:
        """Which of `ids` are on their way from the host, or were loaded for the turn that waits."""
        loading: NDArray[np.bool_] = self._blocks.copying[ids] == LOADING
        return loading | np.isin(ids, table.fetched) if table.fetched else loading

    def _worth_loading(self, ids: BlockIds, first: int) -> NDArray[np.bool_]:
        """Of consecutive blocks from number `first` on, which come from the host when they are needed."""
        ends = (np.arange(first, first + len(ids)) + 1) * self._block_size
        return self._tiers.worth_loading(self._tiers.reloadable(ids), ends)

    def to_load(self, table: BlockTable, first: int, num_tokens: int) -> NDArray[np.bool_]:
        """Of the blocks from number `first` on, which are to be loaded now."""
        ids = table.blocks[first : -(-num_tokens // self._block_size)]
        there: NDArray[np.bool_] = (self._blocks.host_valid[ids] > 0) & (
            self._blocks.copying[ids] == NOT_COPIED
        )
        there &= self._blocks.num_scheduled[ids] == 0
        return there & self._worth_loading(ids, first) if there.any() else there
