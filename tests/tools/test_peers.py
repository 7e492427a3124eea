"""The comparison with other engines: reading their streams, counting, judging, and how they are started."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rpc.client import ContinuoClient
from tools import readme_table
from tools.peers import command, procfs, report, setup
from tools.peers.clients import LlamaClient, VllmClient
from tools.peers.engines import NAMES, EngineFailed, Launch, Running, free_port, launch
from tools.peers.http import PeerError, events
from tools.peers.work import fill, measure_of, together, turn_figures
from tools.workload import Outcome, OverGrpc, Reply, Workload, WorkloadFailed, drive, say

# -- streams


@asynccontextmanager
async def answering(*pieces: bytes) -> AsyncIterator[tuple[int, list[dict]]]:
    """A server that answers every request with `pieces`, one write each: its port, the bodies sent to it."""
    bodies: list[dict] = []
    tasks: list[asyncio.Task | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
        bodies.append(json.loads(await reader.readexactly(length)))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.002)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], bodies
    finally:
        server.close()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


HEAD = b"HTTP/1.1 200 OK\r\nserver: peer\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(**content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def received(*pieces: bytes) -> list[dict]:
    async with answering(*pieces) as (port, _):
        return [each async for each in events(port, "/", {})]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_events_are_whole_wherever_chunks_and_writes_are_cut(size) -> None:
    stream = b": a comment\n\n" + event(n=1) + event(n=2).replace(b"\n", b"\r\n") + event(n=3)
    chunks = b"".join(chunk(stream[at : at + size]) for at in range(0, len(stream), size))
    whole = HEAD + chunks + END
    writes = [whole[at : at + 50] for at in range(0, len(whole), 50)]
    assert await received(*writes) == [{"n": 1}, {"n": 2}, {"n": 3}]


async def test_nothing_is_read_behind_the_end_that_vllm_marks() -> None:
    assert await received(HEAD, chunk(event(n=1)), chunk(b"data: [DONE]\n\n")) == [{"n": 1}]


async def test_an_event_is_there_before_the_next_is_sent() -> None:
    async with answering(HEAD, chunk(event(n=1)), chunk(event(n=2)), END) as (port, _):
        loop = asyncio.get_running_loop()
        times = [loop.time() async for _ in events(port, "/", {})]
    assert times[1] - times[0] > 0.001


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        (
            [b'HTTP/1.1 400 Bad Request\r\nContent-Length: 15\r\n\r\n{"error":"big"}'],
            r'status 400: \{"error":"big"\}',
        ),
        (
            [HEAD, chunk(event(n=1)), chunk(event(error={"code": 500, "message": "full"}))],
            "middle of a reply: .*full",
        ),
        ([HEAD, chunk(event(n=1)), chunk(b'error: {"error": "full"}\n\n')], "middle of a reply: .*full"),
        ([HEAD, chunk(event(n=1))], "cut off"),
        ([HEAD, chunk(event(n=1))[:-9]], "cut off"),
        ([HEAD[:20]], "cut off"),
    ],
)
async def test_a_refusal_an_error_and_a_broken_reply_are_told(pieces, complaint) -> None:
    with pytest.raises(PeerError, match=complaint):
        await received(*pieces)


def vllm_event(ids: Sequence[int], **more: object) -> bytes:
    return event(choices=[{"index": 0, "text": "", "token_ids": list(ids), "prompt_token_ids": None, **more}])


async def test_vllm_is_sent_the_whole_history_and_its_ids_are_read() -> None:
    reply = (vllm_event([5]), vllm_event([6, 7]), vllm_event([], finish_reason="length"))
    async with answering(HEAD, *map(chunk, reply), chunk(event(choices=[])), END) as (port, bodies):
        chat = await VllmClient(port).open()
        first = await say(chat, [1, 2], 3)
        second = await say(chat, [8], 3)
    assert first.ids == second.ids == [5, 6, 7]
    assert [len(ids) for _, ids in first.deltas] == [1, 2]
    assert [body["prompt"] for body in bodies] == [[1, 2], [1, 2, 5, 6, 7, 8]]
    assert bodies[0]["max_tokens"] == bodies[0]["min_tokens"] == 3 and bodies[0]["ignore_eos"]


async def test_llama_server_keeps_each_conversation_in_a_slot_of_its_own() -> None:
    reply = (event(tokens=[5], stop=False), event(tokens=[6], stop=False), event(tokens=[], stop=True))
    async with answering(HEAD, *map(chunk, reply), END) as (port, bodies):
        client = LlamaClient(port, slots=2)
        one, other = await client.open(), await client.open()
        assert (await say(one, [1], 2)).ids == [5, 6]
        await say(other, [1], 2)
        await say(one, [9], 2)
        await one.close()
        await say(await client.open(), [7], 2)
    slots = [body["id_slot"] for body in bodies]
    assert slots[0] == slots[2] == slots[3] != slots[1]
    assert [body["prompt"] for body in bodies] == [[1], [1], [1, 5, 6, 9], [7]]


# -- driving and counting


class FakeClient:
    """Replies at once with as many tokens as `reply` makes of those that were asked for."""

    def __init__(self, reply: Callable[[int], list[list[int]]]) -> None:
        self._reply = reply
        self.open_chats = 0

    async def open(self) -> "FakeClient":
        self.open_chats += 1
        return self

    async def say(self, token_ids: Sequence[int], reply_tokens: int) -> AsyncIterator[list[int]]:
        for ids in self._reply(reply_tokens):
            await asyncio.sleep(0)
            yield ids

    async def close(self) -> None:
        self.open_chats -= 1


def one_by_one(count: int) -> list[list[int]]:
    return [[number] for number in range(count)]


async def test_every_turn_of_every_conversation_is_driven_and_counted() -> None:
    client = FakeClient(lambda count: [[], *one_by_one(count)])
    outcome = await drive(client, Workload(conversations=3, turns=2, new_tokens=5, reply_tokens=4), 100)
    assert (len(outcome.replies), outcome.reply_tokens, client.open_chats) == (6, 24, 0)
    assert len(outcome.itl_s) == 6 * 3
    figures = turn_figures(outcome)
    assert len(figures["ttft_ms_by_turn"]) == 2
    assert figures["tokens_per_s"] == pytest.approx(24 / outcome.wall_s, rel=0.01)


@pytest.mark.parametrize("count", [0, 3, 5])
async def test_a_reply_of_another_length_fails_the_run(count) -> None:
    client = FakeClient(lambda _: one_by_one(count))
    with pytest.raises(WorkloadFailed, match=f"2 of 2 conv.*a reply has {count} tokens; 4 were asked for"):
        await drive(client, Workload(2, 1, 5, 4), 100)


async def test_all_conversations_have_ended_before_a_failure_is_told() -> None:
    turns = iter(range(100))

    def reply(count: int) -> list[list[int]]:
        return one_by_one(0 if next(turns) == 0 else count)

    client = FakeClient(reply)
    with pytest.raises(WorkloadFailed, match="1 of 3 conversations failed"):
        await drive(client, Workload(3, 2, 5, 4), 100)
    assert client.open_chats == 0


def reply_at(*times: float, tokens: int = 1, sent: float = 0.0, turn: int = 0) -> Reply:
    return Reply(0, turn, sent, tuple((at, (7,) * tokens) for at in times), times[-1])


def test_gaps_are_shared_by_the_tokens_that_come_together() -> None:
    reply = Reply(0, 0, 1.0, ((1.5, (1,)), (1.9, (2, 3))), 2.0)
    assert (reply.ttft_s, reply.e2e_s) == (0.5, 1.0)
    assert reply.itl_s == pytest.approx([0.2, 0.2])


def test_first_tokens_are_told_turn_by_turn() -> None:
    outcome = Outcome(2.0, [reply_at(0.1, 0.3), reply_at(0.3, 0.4), reply_at(1.5, 1.6, sent=1.0, turn=1)])
    figures = turn_figures(outcome)
    assert figures["ttft_ms_by_turn"] == [200.0, 500.0]
    assert figures["tokens_per_s"] == 3.0
    assert figures["e2e_ms_mean"] == pytest.approx(1000 * (0.3 + 0.4 + 0.6) / 3, abs=0.01)
    assert figures["normalised_ms_p90"] == 300.0


def test_decoding_counts_only_while_the_whole_batch_decodes() -> None:
    early, late = reply_at(1.0, 2.0, 3.0, 4.0), reply_at(2.5, 3.5, 4.5, 5.5)
    assert together(Outcome(0, [early, late])) == (3, 1.5)  # after 2.5 until 4.0: 3.0, 3.5 and 4.0
    with pytest.raises(ValueError, match="never decoded all at once"):
        together(Outcome(0, [reply_at(1.0, 2.0), reply_at(2.5, 3.5)]))


@pytest.mark.parametrize(("workload", "replies"), [("decode 3x64", 6), ("decode 1x64", 8), ("prefill 20", 5)])
async def test_a_workload_says_as_much_as_its_name(workload, replies) -> None:
    asked: list[tuple[int, int]] = []

    class Noting(FakeClient):
        def say(self, token_ids: Sequence[int], reply_tokens: int) -> AsyncIterator[list[int]]:
            asked.append((len(token_ids), reply_tokens))
            return super().say(token_ids, reply_tokens)

    client = Noting(one_by_one)
    figures = await measure_of(workload)(client, 0)
    assert len(asked) == replies and client.open_chats == 0 and figures["tokens_per_s"] > 0
    if workload.startswith("decode"):
        assert set(asked) == {(62, 1), (1, 64)}  # so that 64 tokens are there when decoding begins
    else:
        assert set(asked) == {(20, 1)}


async def test_filling_holds_all_conversations_at_once() -> None:
    most = 0

    class Noting(FakeClient):
        def say(self, token_ids: Sequence[int], reply_tokens: int) -> AsyncIterator[list[int]]:
            nonlocal most
            most = max(most, self.open_chats)
            assert len(token_ids) + reply_tokens == 64
            return super().say(token_ids, reply_tokens)

    client = Noting(one_by_one)
    await fill(client, 5, 64)
    assert (most, client.open_chats) == (5, 0)


@pytest.mark.parametrize("name", ["two", "decode", "decode 8", "decode axb", "prefill", "prefill much"])
def test_a_workload_that_is_none_is_refused(name) -> None:
    with pytest.raises(ValueError):
        measure_of(name)


# -- medians, targets, tables


def run(workload: str, engine: str, repeat: int = 0, foreign: float = 0.0, **figures: object) -> dict:
    return {
        "workload": workload,
        "engine": engine,
        "repeat": repeat,
        "foreign_cores": foreign,
        "figures": figures,
    }


def test_medians_are_of_the_undisturbed_runs() -> None:
    runs = [
        run("prefill 512", "vllm", n, foreign, tokens_per_s=rate)
        for n, (foreign, rate) in enumerate([(0.0, 10.0), (0.9, 1.0), (0.1, 30.0), (0.0, 20.0)])
    ]
    runs.append({"workload": "prefill 512", "engine": "vllm", "repeat": 4, "failure": "it broke"})
    assert report.summary(runs)["prefill 512"]["vllm"] == {"tokens_per_s": 20.0, "runs": 4, "kept": 3}
    assert report.summary(runs[1:2])["prefill 512"]["vllm"] == {"tokens_per_s": 1.0, "runs": 1, "kept": 0}
    turns = [run("one", "vllm", n, ttft_ms_by_turn=times) for n, times in enumerate([[1, 9], [2, 8], [3, 7]])]
    assert report.summary(turns)["one"]["vllm"]["ttft_ms_by_turn"] == [2, 8]


def a_comparison(ours: float) -> report.Summary:
    """Peers at 100 and 80 tokens/s, Continuo at `ours`; the shape's other figures are 1."""

    def figures(rate: float, ttft: float) -> dict:
        return {
            "tokens_per_s": rate,
            "ttft_ms_mean": ttft,
            "ttft_ms_by_turn": [9.0, ttft],
            "itl_ms_mean": 2.0,
            "itl_ms_p99": 5.0,
            "runs": 3,
            "kept": 3,
        }

    rows = {"continuo": figures(ours, 40.0), "vllm": figures(100.0, 50.0), "llama.cpp": figures(80.0, 60.0)}
    return {
        "many": rows,
        "decode 32x2048": rows,
        "start": {"continuo": {"start_s": 2.0, "runs": 3, "kept": 3}},
    }


def test_targets_are_judged_against_the_better_peer() -> None:
    judged = {
        (each["workload"], each["what"]): each for each in report.judged("llama-160m", a_comparison(125.0))
    }
    rate = judged["many", "tokens/s over the better peer"]
    assert (rate["value"], rate["target"], rate["reached"]) == (1.25, ">= 1.2", True)
    ttft = judged["many", "mean TTFT over the lower of the peers"]
    assert (ttft["value"], ttft["target"], ttft["reached"]) == (0.8, "<= 0.7", False)
    assert not judged["many", "ITL p99 over its mean"]["reached"]
    assert not judged["decode 32x2048", "tokens/s over the better peer"]["reached"]
    assert judged["start", "seconds from spawn to the first token"]["reached"]
    assert not any(workload == "one" for workload, _ in judged), "what was not measured is not judged"


def test_a_target_belongs_to_a_shape() -> None:
    qwen = report.judged("qwen2.5-0.5b", a_comparison(115.0))
    assert not any(each["workload"] == "decode 32x2048" for each in qwen)
    assert qwen[0]["target"] == ">= 1.1" and qwen[0]["reached"]


def test_without_a_peer_nothing_is_told_about_ratios() -> None:
    medians = a_comparison(125.0)
    del medians["many"]["llama.cpp"]
    assert not any(
        each["what"].startswith("tokens/s") for each in report.judged("llama-160m", {"many": medians["many"]})
    )


def test_tables_show_every_engine_and_mark_what_is_missed_or_was_disturbed() -> None:
    medians = a_comparison(125.0)
    medians["many"]["vllm"]["kept"] = 2
    header, many, *_ = report.engines_table(medians)
    assert header[1:] == [report.TITLES[name] for name in NAMES]
    assert many[1].startswith("125 tok/s, TTFT 40 ms") and many[2] == ""
    assert "2 of 3 runs undisturbed" in many[3]
    told = report.aligned(report.targets_table(report.judged("llama-160m", medians)))
    assert "reached" in told and "MISSED" in told


def test_the_readme_shows_the_shapes_that_were_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    assert readme_table.cpu() == "    python -m tools.peers setup DIR"
    result = {
        "command": "python -m tools.peers run llama-160m",
        "date": "2026-11-22",
        "commit": "abc1234",
        "machine": {"cpu": "CPU", "cores": 2, "isa": ["avx2"], "memory_gib": 24},
        "versions": {"vllm": "vLLM 1", "llama.cpp": "llama-server 2"},
        "medians": a_comparison(125.0),
    }
    (tmp_path / "peers_llama-160m.json").write_text(json.dumps(result))
    lines = readme_table.cpu().splitlines()
    assert lines[0] == "| llama-160m | Continuo | Continuo --stateless | vLLM prefix cache | llama.cpp |"
    assert lines[2].startswith(
        "| 16 conversations, 6 turns of 100 + 64 | 125 tok/s, TTFT 40 ms, ITL 2.0/5 ms |"
    )
    told = "Medians of 3 interleaved runs at commit abc1234, beside vLLM 1; llama-server 2."
    assert any(line.startswith(told) and "2 cores of an CPU" in line for line in lines)
    assert lines[-1] == "    python -m tools.peers run llama-160m"


# -- processes


def test_command_lines_have_the_settings_that_are_best_for_each(tmp_path) -> None:
    launches = {name: launch(name, "llama-160m", Path("/model"), tmp_path, 4321) for name in NAMES}
    vllm, llama = launches["vllm"], launches["llama.cpp"]
    assert vllm.environment["VLLM_CPU_OMP_THREADS_BIND"].startswith("0-")
    assert vllm.environment["LD_PRELOAD"] == str(tmp_path / "vllm/lib/libiomp5.so")
    assert vllm.environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert "--enable-prefix-caching --block-size 32" in vllm.told() and "--dtype auto" in vllm.told()
    assert "-np 32 -c 73728" in llama.told() and "--no-kv-unified --cache-ram 0 -ctk f16" in llama.told()
    assert str(tmp_path / "llama-160m.gguf") in llama.command
    assert set(launches["stateless"].command) - set(launches["continuo"].command) == {"--stateless"}
    assert all("4321" in each.told() for each in launches.values())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workloads", "sing"], "'sing' is no workload; there are one, many, decode BxC and prefill N"),
        ([], "vllm/bin/python is not there: python -m tools.peers setup"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, tmp_path, arguments, complaint) -> None:
    monkeypatch.setattr("sys.argv", ["peers", "run", "llama-160m", "--peers", str(tmp_path), *arguments])
    try:
        code = command.main()
    except SystemExit as refused:
        code = refused.code
    assert code == 2 and complaint in capsys.readouterr().err


def test_the_tokenizer_for_llama_cpp_has_pieces_in_ascii() -> None:
    model = setup.ascii_tokenizer()
    pieces = []
    while model:
        assert model[0] == 0x0A
        body, model = model[2 : 2 + model[1]], model[2 + model[1] :]
        pieces.append((body[2 : 2 + body[1]].decode("ascii"), body[-1]))
    assert pieces == [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("a", 1)]


def test_what_a_server_computes_is_ours_only_if_it_is_named() -> None:
    watch = procfs.Watch()
    with subprocess.Popen(["bash", "-c", "sleep 100 & while :; do :; done"], start_new_session=True) as busy:
        try:
            deadline = time.monotonic() + 60
            while procfs.cpu_s([busy.pid]) < 0.3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            pids = procfs.family(busy.pid)
            as_foreign, wall = watch.foreign_cores(), time.perf_counter() - watch._at
            as_ours = watch.foreign_cores(*pids)
        finally:
            os.killpg(busy.pid, signal.SIGKILL)
    assert len(pids) == 2 and procfs.memory_bytes([os.getpid()]) > 1e6
    assert as_foreign >= 0.2 / wall
    assert as_ours <= as_foreign - 0.2 / wall


async def test_a_server_that_does_not_start_is_told_with_its_last_words() -> None:
    broken = Launch("vllm", ("bash", "-c", "echo it cannot be; exit 3"), lambda: VllmClient(1), free_port())
    with pytest.raises(EngineFailed, match="vllm does not serve:\nit cannot be"):
        await Running.start(broken)


async def test_continuo_is_driven_as_the_others_are(serve, talking_model) -> None:
    server = serve(talking_model, "--data-dir", "none", "--device-kv-tokens", "2048")
    client = OverGrpc(ContinuoClient(server.address))
    workload = Workload(conversations=2, turns=2, new_tokens=20, reply_tokens=5)
    said = [(await drive(client, workload, 100)).replies for _ in range(2)]
    await client.close()
    first, again = ({(each.conversation, each.turn): each.ids for each in replies} for replies in said)
    assert first == again and len(first) == 4


def test_a_part_of_a_run_does_not_overwrite_a_whole_one() -> None:
    assert command.result_name("llama-160m", is_whole=True) == "peers_llama-160m"
    assert command.result_name("llama-160m", is_whole=False) != "peers_llama-160m"
