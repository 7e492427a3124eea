"""Workloads from files: dialogues in words, and traces of lengths and times.  JSON lines, plain or gzip."""

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tools.bench.workload import Exchange, Script

SHARED_BLOCK = 512  # tokens of a Mooncake block; all its requests begin with the same one
Parsed = TypeVar("Parsed")
Objects = Iterator[tuple[int, dict[str, Any]]]


class FileError(Exception):
    """A workload file that cannot be read, names the line."""


def dialogues(path: Path, seed: int, think_s: float, at_most: int = 200) -> list[Script]:
    """Lines with `messages` of user and assistant in turns, user first; `at_most` of them, drawn by `seed`.

    Lengths are still 0: only a server's tokenizer can tell them.  Think times are exponential with this mean.
    """
    draw = random.Random(f"dialogues {seed}")
    scripts = [_parsed(path, number, each, _dialogue) for number, each in _objects(path)]
    if len(scripts) > at_most:
        scripts = draw.sample(scripts, at_most)
    return [
        Script(
            tuple(
                Exchange(0, 0, draw.expovariate(1.0 / think_s) if turn else 0.0, said, answered)
                for turn, (said, answered) in enumerate(pairs)
            )
        )
        for pairs in scripts
    ]


def trace(path: Path, scale: float, time_scale: float) -> list[Script] | list[tuple[float, Script]]:
    """Coding sessions as a pool of scripts, for an arrival process to draw from; or a Mooncake trace as
    conversations with the second in which each begins.  All times are multiplied by `time_scale`.
    """
    objects = _objects(path)
    number, first = next(objects)
    if {"timestamp", "input_length", "output_length", "hash_ids"} <= set(first):
        requests = [_parsed(path, number, first, _request)]
        requests += [_parsed(path, number, each, _request) for number, each in objects]
        return _linked(requests, scale, time_scale)
    if "requests" in first:
        scripts = _parsed(path, number, first, lambda session: _sessions(session, scale))
        for number, each in objects:
            scripts += _parsed(path, number, each, lambda session: _sessions(session, scale))
        return [script.paced(time_scale) for script in scripts]
    raise FileError(
        f"{path}, line {number}: an object with {', '.join(sorted(first)[:6])} is of no trace known here; "
        "a Mooncake trace has timestamp, input_length, output_length, hash_ids; coding sessions have requests"
    )


def _objects(path: Path) -> Objects:
    """Line number and JSON object of every line that is not empty."""
    count = 0
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt") if packed else open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                value = _parsed(path, number, line, json.loads)
                if not isinstance(value, dict):
                    raise FileError(f"{path}, line {number}: is no JSON object")
                count += 1
                yield number, value
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if not count:
        raise FileError(f"{path} is empty")


def _parsed(path: Path, number: int, value: Any, parse: Callable[[Any], Parsed]) -> Parsed:
    try:
        return parse(value)
    except KeyError as error:
        raise FileError(f"{path}, line {number}: has no {error}") from None
    except (ValueError, TypeError) as error:
        raise FileError(f"{path}, line {number}: {error}") from None


def _dialogue(line: dict[str, Any]) -> list[tuple[str, str]]:
    """What the user says and what the assistant answers, by turn; a last word without answer is not."""
    messages = line["messages"]
    roles, texts = ([message[key] for message in messages] for key in ("role", "content"))
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("the content of a message is no text")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2) or len(roles) < 2:
        raise ValueError("user and assistant do not take turns, or there is no reply")
    return list(zip(texts[::2], texts[1::2], strict=False))


def _request(line: dict[str, Any]) -> dict[str, Any]:
    _check_counts(line, "timestamp", "input_length", "output_length")
    if not isinstance(line["hash_ids"], list):
        raise ValueError("hash_ids is no list")
    return line


def _linked(
    requests: Sequence[dict[str, Any]], scale: float, time_scale: float
) -> list[tuple[float, Script]]:
    """Conversations, inferred: a request is the next turn of the latest one whose full blocks, two or more,
    it contains.  Block ids name everything before them, so the last full block decides.  What a request adds
    is what its prompt has beyond the previous prompt and reply.
    """
    ends: dict[int, list[dict[str, Any]]] = {}
    conversations: list[list[dict[str, Any]]] = []
    for request in sorted(requests, key=lambda each: each["timestamp"]):
        known = next((id for id in reversed(request["hash_ids"]) if id in ends), None)
        if known is None:
            conversations.append(turns := [])
        else:
            turns = ends[known]
        turns.append(request)
        full = request["input_length"] // SHARED_BLOCK
        if full >= 2 and full <= len(request["hash_ids"]):
            ends[request["hash_ids"][full - 1]] = turns
    return [
        (time_scale * turns[0]["timestamp"] / 1000, _timed(turns, scale, time_scale))
        for turns in conversations
    ]


def _timed(turns: Sequence[dict[str, Any]], scale: float, time_scale: float) -> Script:
    lengths = [(turn["input_length"], turn["output_length"]) for turn in turns]
    shared = min(SHARED_BLOCK, turns[0]["input_length"])
    return Script(
        tuple(
            Exchange(new, reply, at_s=time_scale * (turn["timestamp"] - turns[0]["timestamp"]) / 1000)
            for turn, (new, reply) in zip(turns, _added(lengths, scale), strict=True)
        ),
        shared_tokens=round(scale * shared),
    )


def _sessions(line: dict[str, Any], scale: float) -> list[Script]:
    """One session and its helpers, which are conversations of their own.  Where a prompt is shorter than the
    one before, the client has rewritten the history: there a new conversation begins.
    """
    scripts: list[Script] = []
    turns: list[dict[str, Any]] = []
    for request in line["requests"]:
        if request["type"] == "subagent":
            scripts += _sessions(request, scale)
            continue
        _check_counts(request, "in", "out", *({"think_time"} & set(request)))
        if turns and request["in"] < turns[-1]["in"]:
            scripts.append(_session(turns, scale))
            turns = []
        turns.append(request)
    return [*scripts, _session(turns, scale)] if turns else scripts


def _session(turns: Sequence[dict[str, Any]], scale: float) -> Script:
    added = _added([(turn["in"], turn["out"]) for turn in turns], scale)
    thoughts = [0.0, *(float(turn.get("think_time", 0.0)) for turn in turns[1:])]
    return Script(
        tuple(Exchange(*lengths, think_s) for lengths, think_s in zip(added, thoughts, strict=True))
    )


def _added(lengths: Sequence[tuple[int, int]], scale: float) -> list[tuple[int, int]]:
    """From whole prompts to what each turn adds, and its reply; each at least 1."""
    ends = [0, *(prompt + reply for prompt, reply in lengths)]
    return [
        (max(1, round(scale * (prompt - before))), max(1, round(scale * reply)))
        for before, (prompt, reply) in zip(ends, lengths, strict=False)
    ]


def _check_counts(line: dict[str, Any], *names: str) -> None:
    for name in names:
        if isinstance(line[name], bool) or not isinstance(line[name], int | float) or not line[name] >= 0:
            raise ValueError(f"{name} is {line[name]!r}; it should be a number of at least 0")
