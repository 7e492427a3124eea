"""What begins with a slash: a table of commands, each a function of the talk and of what follows the name."""

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from rpc._generated import continuo_pb2 as pb
from rpc.client import Sampling
from tools.chat.talk import Mistake, Talk
from tools.chat.wording import count, listing, settings, statistics

KEYS = "Ctrl-C ends a reply, Ctrl-D the chat; a line that ends in \\ goes on; a paste is one message."
NUM_LISTED = 20
_HINTS = {name: hint for name, hint in get_type_hints(Sampling).items() if get_origin(hint) is not dict}
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list[int]: "a whole number, or several like [1, 2]",
    list[str]: 'a text, or several like ["a", "b"]',
}


@dataclass(frozen=True)
class Command:
    arguments: str
    does: str
    act: Callable[[Talk, str], Awaitable[None]]


def parse(text: str) -> tuple[str, str] | None:
    """The name of a command and what follows it; None for a message, like one about /etc/hosts."""
    match = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text.strip(), re.DOTALL)
    return (match[1], match[2] or "") if match and not text.startswith(" ") else None


async def perform(talk: Talk, name: str, argument: str) -> None:
    """Raises Mistake or ContinuoError."""
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        raise Mistake(
            f"there is no command /{name}; "
            + (f"did you mean /{near[0]}?" if near else "/help lists them.")
            + "  A space before the / makes it a message."
        )
    command = COMMANDS[name]
    if argument and not command.arguments:
        raise Mistake(f"/{name} takes nothing behind it")
    if not argument and command.arguments and not command.arguments.startswith("["):
        raise Mistake(f"/{name} {command.arguments}: {command.does}")
    await command.act(talk, argument)


def complete(text: str) -> list[str]:
    """For the tab key."""
    return [f"/{name} " for name in COMMANDS if f"/{name}".startswith(text)] if text.startswith("/") else []


async def _rewind(talk: Talk, argument: str) -> None:
    chat = talk.begun()
    stay = _turns_before(chat.committed_turns, argument or "1", fewest=1)
    _, turns = await talk.client.get(chat.id)
    await chat.rewind(turns=stay)
    talk.screen.note(f"back to {count(stay, 'turn')}, {count(chat.committed_tokens, 'token')}")
    said = [message.content for message in turns[stay].messages if message.role == "user"]
    talk.screen.suggest(said[-1] if said else "")


async def _regenerate(talk: Talk, argument: str) -> None:
    chat = talk.begun()
    await talk.answer(chat.regenerate(**_sampling(argument), on_state=talk.state_changed))


async def _fork(talk: Talk, argument: str) -> None:
    chat = talk.begun()
    stay = _turns_before(chat.committed_turns, argument or "0", fewest=0)
    fork = await chat.fork(turns=stay)
    talk.leave()
    talk.chat = fork
    talk.screen.note(f"this is {fork.id} now, with {count(stay, 'turn')} of the other")


async def _append(talk: Talk, argument: str) -> None:
    await talk.append(argument)


async def _file(talk: Talk, argument: str) -> None:
    await talk.append(_text_of(argument))


async def _set(talk: Talk, argument: str) -> None:
    chosen = _sampling(argument)
    if chosen and talk.chat is not None:
        await talk.chat.update(**chosen)
    talk.sampling |= chosen
    if talk.chat is None:
        talk.screen.note(settings(pb.Sampling(**talk.sampling)))
    else:
        conversation, _ = await talk.client.get(talk.id)
        talk.screen.note(settings(conversation.sampling))


async def _system(talk: Talk, argument: str) -> None:
    talk.leave()
    talk.system = argument
    talk.screen.note("a new conversation, with this system message")


async def _new(talk: Talk, argument: str) -> None:
    talk.leave()
    talk.screen.note("a new conversation")


async def _list(talk: Talk, argument: str) -> None:
    found: list[pb.Conversation] = []
    async for conversation in talk.client.list(page_size=NUM_LISTED):
        found.append(conversation)
        if len(found) > NUM_LISTED:
            break
    talk.listed = [conversation.conversation_id for conversation in found[:NUM_LISTED]]
    more = "\n     ... and older ones" if len(found) > NUM_LISTED else ""
    talk.screen.note(listing(found[:NUM_LISTED], talk.id) + more)


async def _open(talk: Talk, argument: str) -> None:
    await talk.resume(_id(talk, argument))


async def _delete(talk: Talk, argument: str) -> None:
    id = _id(talk, argument)
    await talk.client.delete(id)
    if id == talk.id:
        talk.chat = None
    talk.screen.note(f"{id} is erased")


async def _stats(talk: Talk, argument: str) -> None:
    talk.screen.note(statistics(*await talk.client.get(talk.begun().id)))


async def _help(talk: Talk, argument: str) -> None:
    lines = [f"{f'/{name} {it.arguments}':30}{it.does}" for name, it in COMMANDS.items()]
    talk.screen.note("\n".join([*lines, KEYS]))


async def _quit(talk: Talk, argument: str) -> None:
    talk.has_ended = True


COMMANDS = {
    "rewind": Command("[N]", "take the last N turns back (1), to say it differently", _rewind),
    "regenerate": Command("[NAME=VALUE ...]", "another reply to the last message", _regenerate),
    "fork": Command("[N]", "go on in a copy, without the last N turns (0)", _fork),
    "append": Command("TEXT", "tell something without asking for a reply", _append),
    "file": Command("PATH", "the same with the text of a file", _file),
    "set": Command(
        "[NAME=VALUE ...]", "how replies are chosen, as temperature=0.7; alone: what is set", _set
    ),
    "system": Command("TEXT", "begin anew with this system message", _system),
    "new": Command("", "begin anew", _new),
    "list": Command("", "the conversations that the server keeps, last used first", _list),
    "open": Command("ID", "go on with one of them; its number in the list will do", _open),
    "delete": Command("ID", "erase one of them", _delete),
    "stats": Command("", "what this conversation has cost so far", _stats),
    "help": Command("", "this", _help),
    "quit": Command("", "leave; the conversation is kept", _quit),
}


def _turns_before(committed: int, argument: str, fewest: int) -> int:
    if not argument.isdecimal() or not fewest <= int(argument) <= committed:
        raise Mistake(
            f"{argument!r} is not a number of turns from {fewest} to {committed}, as many as there are"
        )
    return committed - int(argument)


def _text_of(file: str) -> str:
    path = Path(file).expanduser()
    try:
        text = path.read_text()
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Mistake(f"{path} cannot be read as text: {error}") from None
    if not text.strip():
        raise Mistake(f"{path} is empty")
    return text


def _id(talk: Talk, argument: str) -> str:
    if argument.isdecimal() and 0 < int(argument) <= len(talk.listed):
        return talk.listed[int(argument) - 1]
    return argument


def _sampling(argument: str) -> dict[str, Any]:
    """NAME=VALUE ... as keyword arguments; a value is JSON, or else a text up to the next space."""
    chosen: dict[str, Any] = {}
    while argument := argument.strip():
        name, _, rest = argument.partition("=")
        if name not in _HINTS or not rest.strip():
            word = argument.split()[0]
            raise Mistake(f"{word!r} is not NAME=VALUE with a name out of {', '.join(_HINTS)}")
        text, argument = _value(rest)
        chosen[name] = _setting(name, text)
    return chosen


def _value(text: str) -> tuple[str, str]:
    """The JSON value or else the word that `text` begins with, and what follows it."""
    text = text.lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        end = 0
    if not end or text[end : end + 1].strip():
        end = len(text.split()[0])
    return text[:end], text[end:]


def _setting(name: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    hint = _HINTS[name]
    if get_origin(hint) is list and not isinstance(value, list):
        value = [value]
    try:
        if value is None:  # protobuf would leave it out
            raise TypeError
        pb.Sampling(**{name: value})
    except (TypeError, ValueError):
        raise Mistake(f"{name} cannot be {text}; it is {_KINDS[hint]}") from None
    return value
