"""The main job, told as a story on screen against a real server over gRPC, with a scoreboard at its end.

    tools/demo.sh [--model DIR|HUB_ID]

Friends tell facts; visitors take their place in memory; the server is killed while it answers; all are asked.
The same script is then played with the history sent again every turn.  The last line on stdout is JSON.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from engine.errors import EngineError
from rpc.client import ContinuoClient, ContinuoError, Unavailable
from tools.arguments import BUNDLED_MODEL, model
from tools.demo_play import (
    Cast,
    Exchange,
    Kept,
    Resent,
    Speaker,
    make_cast,
    make_control,
    num_comparable,
    play,
)
from tools.demo_score import Score
from tools.demo_screen import Screen
from tools.hub import HubError, resolve_model
from tools.server_process import ServerFailed, ServerProcess

DEVICE_KV_TOKENS = 5_120  # room for all friends, or for all visitors, not for both
HOST_KV_TOKENS = 2_560  # room for some of the friends while they are away


class Stage:
    """A server process and a client of it, which a restart replaces."""

    server: ServerProcess
    client: ContinuoClient

    def __init__(self, model: Path, *arguments: str) -> None:
        self._arguments = (
            *(str(model), "--listen", "127.0.0.1:0", "--device-kv-tokens", str(DEVICE_KV_TOKENS)),
            *("--dtype", "float32"),  # in which the same tokens come out however the KV came about
            *arguments,
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self.server = await ServerProcess.start(*self._arguments)
        # No retries: when to come back, and to which server, is part of the story.
        self.client = ContinuoClient(self.server.address, retry=False)
        await self.client.generate(messages=[{"role": "user", "content": "Hello!"}], max_tokens=4)  # warms up

    async def stop(self) -> None:
        await self.client.close()
        await self.server.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/demo.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=model,
        default=str(BUNDLED_MODEL),
        metavar="DIR|HUB_ID",
        help="play it on your own model: what it recalls is then reported, not required",
    )
    chosen = parser.parse_args(arguments)
    try:
        folder = resolve_model(chosen.model).resolve()
        score = asyncio.run(_play_both(folder, Screen()))
    except (ServerFailed, ContinuoError, HubError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    print(json.dumps(score.figures()))
    return 1 if score.failures() else 0


async def _play_both(model: Path, screen: Screen) -> Score:
    begin = time.perf_counter()
    is_bundled = model == BUNDLED_MODEL
    cast, control, again = make_cast(), make_control(), make_cast()
    screen.title(
        "Continuo serves conversations: it keeps what was said, you send what is new.",
        f"Model: {'a tiny one, trained for this demo' if is_bundled else model}. "
        f"KV memory: {DEVICE_KV_TOKENS:,} tokens, and {HOST_KV_TOKENS:,} in a second tier.",
    )
    with tempfile.TemporaryDirectory(prefix="continuo-demo-") as data_dir:
        async with Stage(model, "--data-dir", data_dir, "--host-kv-tokens", str(HOST_KV_TOKENS)) as stage:
            num_cut_off = await _play_kept(stage, cast, screen)
            await _play_control(stage.client, control, screen)
            comparable = [await num_comparable(stage.client, speaker) for speaker in cast.everybody]
    async with Stage(model, "--data-dir", "none", "--stateless") as stage:
        await _play_resent(stage.client, again, screen)
    score = Score(cast, control, again, comparable, num_cut_off, is_bundled, time.perf_counter() - begin)
    screen.scoreboard(score.rows())
    screen.verdict(score.failures(), score.judged)
    return score


async def _play_kept(stage: Stage, cast: Cast, screen: Screen) -> int:
    """The story with a server that keeps conversations.  Returns how many replies the kill cut off."""
    friends, visitors = cast.friends, cast.visitors

    screen.act(f"{len(friends)} friends tell a server about themselves, all at once.")
    await _keep(stage.client, friends)
    with screen.counting("talking", cast.num_opening) as count:
        told = await play(friends, cast.num_opening, count)
    for exchange in [exchange for exchange in told if exchange.tells][:3]:
        screen.dialogue(exchange)
    screen.note(f"{len(told)} turns, and {_sum(told, 'recomputed_tokens'):,} tokens were read twice.")

    screen.act(f"{len(visitors)} visitors tell long stories. The friends' idle KV makes room for them.")
    await _keep(stage.client, visitors)
    with screen.counting("visiting", len(visitors[0].steps)) as count:
        await play(visitors, after_turn=count)
    back = await play(friends, 1)
    names = ("cached_device_tokens", "cached_host_tokens", "recomputed_tokens")
    device, host, again = (_sum(back, name) for name in names)
    screen.note(f"The friends come back, with {device + host + again:,} tokens of history:")
    screen.note(
        f"{device:,} still on the device, {host:,} copied back from the host, {again:,} computed again."
    )

    screen.act("kill -9, in the middle of their next replies.")
    begin, pid = time.perf_counter(), stage.server.pid
    cut_off = await _say_and_kill(friends, stage)
    screen.note(f"Server {pid} died during {len(cut_off)} of {len(friends)} replies.")
    await stage.stop()
    await stage.start()
    await _resume(stage.client, friends)
    await asyncio.gather(*(friend.say_next() for friend in cut_off))
    seconds = time.perf_counter() - begin
    screen.note(f"{seconds:.1f} s later all is resumed by id, and those replies are given in full.")

    screen.act("Do they remember? Every fact is asked for.")
    with screen.counting("asking", len(friends[0].steps) - len(friends[0].exchanges)) as count:
        answers = await play(friends, after_turn=count)
    asked = [exchange for exchange in answers if exchange.asks_for_a_fact]
    for exchange in asked[:4]:
        screen.dialogue(exchange, verdict=exchange.is_right)
    screen.note(f"{sum(exchange.is_right for exchange in asked)} of {len(asked)} facts are right.")
    return len(cut_off)


async def _play_control(client: ContinuoClient, control: Sequence[Speaker], screen: Screen) -> None:
    screen.act("The same questions, asked by strangers who have told nothing.")
    await _keep(client, control)
    with screen.counting("asking", len(control[0].steps)) as count:
        answers = await play(control, after_turn=count)
    for exchange in answers[:2]:
        screen.dialogue(exchange, verdict=exchange.says_not_told)
    num_right = sum(exchange.says_not_told for exchange in answers)
    screen.note(f"{num_right} of {len(answers)} times it says so.")


async def _play_resent(client: ContinuoClient, cast: Cast, screen: Screen) -> None:
    screen.act("All of it once more, with the whole history sent and read again every turn.")
    for speaker in cast.everybody:
        speaker.medium = Resent(client)
    with screen.counting("reading", len(cast.friends[0].steps) + len(cast.visitors[0].steps)) as count:
        await play(cast.friends, cast.num_opening, count)
        await play(cast.visitors, after_turn=count)
        await play(cast.friends, after_turn=count)


async def _say_and_kill(friends: Sequence[Speaker], stage: Stage) -> list[Speaker]:
    """Kills the server as soon as one reply has begun; returns those who did not hear theirs to the end."""
    begun = asyncio.Event()
    replies = [asyncio.ensure_future(friend.say_next(begun.set)) for friend in friends]
    waiting = asyncio.ensure_future(begun.wait())
    await asyncio.wait([waiting, *replies], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    await stage.server.kill()
    outcomes = await asyncio.gather(*replies, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Unavailable):
            raise outcome
    return [
        friend for friend, outcome in zip(friends, outcomes, strict=True) if isinstance(outcome, Unavailable)
    ]


def _sum(exchanges: Sequence[Exchange], field: str) -> int:
    """Of a field of their usage."""
    return sum(getattr(exchange.turn.usage, field) for exchange in exchanges)


async def _keep(client: ContinuoClient, speakers: Sequence[Speaker]) -> None:
    """A new conversation for each, kept by the server."""
    for speaker in speakers:
        speaker.medium = Kept(await client.open())


async def _resume(client: ContinuoClient, speakers: Sequence[Speaker]) -> None:
    for speaker in speakers:
        assert isinstance(speaker.medium, Kept)
        speaker.medium = Kept(await client.resume(speaker.medium.chat.id))


if __name__ == "__main__":
    sys.exit(main())
