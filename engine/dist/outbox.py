"""What a manager has to say and to have done, until its owner collects it."""

from engine.dist.entries import Action, Body, Effect, Message, RankId


class Outbox:
    def __init__(self, rank: RankId | None, epoch: int) -> None:
        self.epoch = epoch
        self._rank = rank
        self._effects: list[Effect] = []

    def say(self, to: RankId | None, body: Body) -> None:
        self._effects.append(Message(self._rank, self.epoch, to, body))

    def do(self, action: Action) -> None:
        self._effects.append(action)

    def collect(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects
