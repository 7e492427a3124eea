"""The KV blocks that a simulated rank counts."""

from collections.abc import Mapping
from typing import Protocol

NOWHERE: Mapping[int, int] = {}


class Memory(Protocol):
    """As a rank's scheduler sees it.  Blocks; a conversation is called by its request's number."""

    num_blocks: int
    can_borrow: bool

    @property
    def num_free(self) -> int: ...

    def grow(self, conversation: int, num_blocks: int) -> bool:
        """So many more blocks at home, or none."""
        ...

    def remote(self, conversation: int) -> Mapping[int, int]:
        """Blocks of it on each other rank."""
        ...

    def release(self, conversation: int) -> None:
        """All of them, wherever they are."""
        ...

    def ask_for_room(self, conversation: int, num_blocks: int) -> bool:
        """This rank's own work lacks so many blocks: True if some will come.  Blocks of the conversation may
        move to other ranks for it.
        """
        ...

    def recall(self, num_blocks: int) -> None:
        """So many of those that are lent are wanted back."""
        ...

    def bring_home(self, num_blocks: int) -> None:
        """There is room for so many that are elsewhere."""
        ...

    def move(self, num_tokens: float, seconds: float) -> None:
        """So many tokens at most may move from here or be fetched, in that time."""
        ...

    @property
    def num_moving(self) -> int:
        """Blocks that wait for `move`."""
        ...


class OwnMemory:
    """Of an instance that knows no other."""

    can_borrow = False
    num_moving = 0

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = self.num_free = num_blocks
        self._held: dict[int, int] = {}

    def grow(self, conversation: int, num_blocks: int) -> bool:
        if num_blocks > self.num_free:
            return False
        self.num_free -= num_blocks
        self._held[conversation] = self._held.get(conversation, 0) + num_blocks
        return True

    def remote(self, conversation: int) -> Mapping[int, int]:
        return NOWHERE

    def release(self, conversation: int) -> None:
        self.num_free += self._held.pop(conversation, 0)

    def ask_for_room(self, conversation: int, num_blocks: int) -> bool:
        return False

    def recall(self, num_blocks: int) -> None:
        pass

    def bring_home(self, num_blocks: int) -> None:
        pass

    def move(self, num_tokens: float, seconds: float) -> None:
        pass
