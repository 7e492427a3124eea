"""The command line: declares arguments, reads the environment, and hands both to the command's own module.

Nothing heavy is imported before the arguments are known to be right, and nobody else reads the environment.
A command is a module with `run(chosen) -> exit code` and `EXPECTED`, the errors that are told in one line:
those of its `USAGE` end with 2, the others with 1.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from kernels import __version__
from tools.arguments import (
    BUNDLED_MODEL,
    above_zero,
    count,
    memory,
    model,
    model_folder,
    positive,
    seconds,
    share,
    some_seconds,
    some_text,
    token_ids,
)

DEFAULT_ADDRESS = "127.0.0.1:50051"
SPINS = "1000"
"""How often an OpenMP thread looks for work before it sleeps, some 24 us on a Zen 5.  A step of llama-160m,
batch 1, beside little else: 12.5 ms with none, 11.3 with half, 9.5 with twice, 9.8 with ten times as many,
which stall it where others want the cores (150 ms, with none 15).  tools/bench_threads.py measures it.
"""


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 success, 1 failure, 2 wrong usage."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        _use_environment(chosen)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    try:
        command = import_module(f"tools.{chosen.command}")
        try:
            return int(command.run(chosen))
        except command.EXPECTED as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if isinstance(error, command.USAGE) else 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("engine", "kernels", "rpc", "tools"):
            raise
        what = f"continuo {chosen.command} needs the server's packages, and {error.name} is not here"
        print(f"error: {what}; install them with: pip install '.[server]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has gone; let nothing more be written there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="continuo",
        description="Serves conversations whose state stays between turns, over gRPC.",
        epilog="continuo COMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=f"continuo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _declare_serve(commands.add_parser)
    _declare_health(commands.add_parser)
    _declare_chat(commands.add_parser)
    _declare_generate(commands.add_parser)
    _declare_top(commands.add_parser)
    _declare_bench(commands.add_parser)
    _declare_profile(commands.add_parser)
    return parser


def _declare_serve(add_command: Callable[..., Parser]) -> None:
    parser = add_command(
        "serve",
        help="serve a model over gRPC",
        description="Serves a model over gRPC until Ctrl-C or SIGTERM, which drain; a second ends it.",
        epilog="stdout says 'listening on HOST:PORT' when ready. Exit: 0 drained, 1 failure, 2 wrong usage.",
    )
    _declare_model(parser)
    _declare_engine(parser)

    _declare_idle_kv(parser)
    _declare_load(parser)
    _declare_data_dir(parser.add_argument_group("state").add_argument)

    add = parser.add_argument_group(
        "exposure", "Any address but loopback needs tokens and TLS, or --insecure."
    ).add_argument
    add(
        "--listen",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help=f"port 0 = any free one ({DEFAULT_ADDRESS})",
    )
    add("--token-file", type=Path, metavar="FILE", help="who may call: lines 'tenant token [admin]'")
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    add("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    add("--insecure", action="store_true", help="accept the risk of no tokens or no TLS")

    add = parser.add_argument_group("operation").add_argument
    add(
        "--drain-grace",
        type=seconds,
        default=30.0,
        metavar="S",
        help="seconds that running turns may go on when draining (30)",
    )
    add(
        "--step-timeout",
        type=some_seconds,
        default=120.0,
        metavar="S",
        help="seconds after which a step counts as stuck: health turns off and the server ends (120)",
    )
    add(
        "--metrics",
        metavar="HOST:PORT",
        help="serve metrics for Prometheus there, to everybody who reaches it (off)",
    )
    add(
        "--step-profile",
        type=Path,
        metavar="FILE",
        help="write there, a line of JSON per step, what the time of every step goes to (off)",
    )
    add(
        "--until-eof",
        action="store_true",
        help="drain when stdin ends; for programs that start a server of their own",
    )
    add(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what goes to stderr (info)",
    )
    add("--log-json", action="store_true", help="one JSON object per line on stderr")


def _declare_health(add_command: Callable[..., Parser]) -> None:
    parser = add_command(
        "health",
        help="ask a server whether it can serve",
        description="Asks a server whether it can serve. Exit: 0 it does, 1 it does not or nobody answers.",
    )
    add = parser.add_argument
    add("--server", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"that listens ({DEFAULT_ADDRESS})")
    add("--tls-ca", type=Path, metavar="FILE", help="use TLS and trust this certificate authority (PEM)")


def _declare_chat(add_command: Callable[..., Parser]) -> None:
    parser = add_command(
        "chat",
        help="talk to a model in the terminal",
        description="Talks to a server; with MODEL, to one that is started for this chat and ends with it. "
        "Ctrl-C cancels a reply, Ctrl-D ends the chat. Piped, it answers line by line.",
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group().add_argument
    where(
        "model",
        nargs="?",
        type=model,
        metavar="MODEL",
        help="a folder in Hugging Face format or a hub id like org/name, to be served for this chat",
    )
    where("--server", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"that listens ({DEFAULT_ADDRESS})")
    add("--conversation", type=some_text, metavar="ID", help="go on with this conversation")
    add("--system", type=some_text, metavar="TEXT", help="system message of a new conversation")
    _declare_caller(add)
    _declare_hub(add)
    _declare_data_dir(add)


def _declare_top(add_command: Callable[..., Parser]) -> None:
    parser = add_command(
        "top",
        help="see what a server does",
        description="Shows a server's turns, conversations, memory and speed until Ctrl-C. "
        "Piped, it writes a line per interval, the first one over all since the server's start.",
        epilog="A server with tokens shows this only to an admin.",
    )
    add = parser.add_argument
    add("--server", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"that listens ({DEFAULT_ADDRESS})")
    _declare_caller(add)
    add("--interval", type=positive, default=1, metavar="S", help="whole seconds between two looks (1)")
    add("--once", action="store_true", help="look once, at all since the server's start")


def _declare_bench(add_command: Callable[..., Parser]) -> None:
    parser = add_command(
        "bench",
        help="measure a server under multi-turn load",
        description="Holds many conversations with a server over gRPC and measures what their clients see. "
        "Without --server it starts one for every point, with the arguments of serve that are given.",
        epilog="Progress goes to stderr, the table to stdout. What the figures mean is printed below it.",
    )
    where = parser.add_mutually_exclusive_group().add_argument
    where("model", nargs="?", type=model, metavar="MODEL", help="as of serve (the bundled demo model)")
    where("--server", metavar="HOST:PORT", help="measure the one that listens there")
    where(
        "--from",
        dest="from_file",
        type=Path,
        metavar="FILE",
        help="show a report of --json again, measure nothing",
    )
    _declare_caller(parser.add_argument)

    add = parser.add_argument_group("what is said").add_argument
    add(
        "--workload",
        nargs="+",
        default=["chat"],
        metavar=("KIND", "FILE"),
        help="chat: short turns; agent: many turns, long inputs, short pauses; dialogues FILE: messages of "
        "user and assistant; trace FILE: lengths and times, of Mooncake or of coding sessions (chat)",
    )
    add("--lengths", choices=("sharegpt", "ultrachat"), help="of chat: whose means (sharegpt)")
    add("--scale", type=above_zero, metavar="X", help="multiply all lengths, as for a small machine (1)")
    add("--time-scale", type=above_zero, metavar="X", help="multiply all times of a trace (1)")
    add(
        "--think-time",
        type=above_zero,
        metavar="S",
        help="mean seconds between a reply and the next turn (60; else the workload's own)",
    )
    add("--cancel-rate", type=share, default=0.0, metavar="X", help="share of turns cancelled midway (0)")
    add(
        "--resume-rate",
        type=share,
        default=0.0,
        metavar="X",
        help="share of turns said after leaving the stream and coming back by id (0)",
    )
    add("--seed", type=count, default=0, metavar="N", help="the same seed says the same (0)")

    add = parser.add_argument_group("how much").add_argument
    add(
        "--rates",
        type=above_zero,
        nargs="+",
        metavar="R",
        help="turns per second to be offered, one point each (1)",
    )
    add(
        "--conversations",
        type=positive,
        nargs="+",
        metavar="N",
        help="always so many, one point each; with --rates their think time follows",
    )
    add(
        "--warmup",
        type=seconds,
        default=10.0,
        metavar="S",
        help="not measured, after the histories are filled (10)",
    )
    add("--duration", type=some_seconds, default=60.0, metavar="S", help="measured (60)")
    add(
        "--repeats",
        type=positive,
        default=1,
        metavar="N",
        help="of the whole sweep, with other seeds; medians are told (1)",
    )

    add = parser.add_argument_group("what comes out").add_argument
    add("--slo-ttft-ms", type=above_zero, metavar="X", help="limit for goodput")
    add("--slo-tpot-ms", type=above_zero, metavar="X", help="limit for goodput")
    add(
        "--at-normalised-ms",
        type=above_zero,
        metavar="X",
        help="tell the turns per second at which the p90 normalised latency crosses this",
    )
    add(
        "--step-profile",
        action="store_true",
        help="tell what the time of the server's steps goes to: linears, attention, sampling, idle ...",
    )
    add("--json", type=Path, metavar="FILE", help="everything measured, point by point")
    add("--plots", type=Path, metavar="DIR", help="PNG files; they need matplotlib (the extra bench)")

    parser.add_argument_group("servers that are started").add_argument(
        "--compare",
        nargs="+",
        choices=("stateless", "device", "two-tier", "lru", "lru-tail"),
        metavar="NAME",
        help="take turns at every load: stateless, device (no host tier), two-tier, lru, lru-tail (two tiers "
        "with that policy)",
    )
    _declare_for_serve(parser)


def _declare_for_serve(parser: Parser) -> None:
    """Those arguments of `serve` that say what a server is like, without defaults: what is not given
    is absent."""
    own = set(parser._actions)
    _declare_hub(parser.add_argument)
    _declare_engine(parser)
    _declare_idle_kv(parser)
    _declare_load(parser)
    for action in parser._actions:
        if action not in own:
            action.default = argparse.SUPPRESS


def _declare_generate(add_command: Callable[..., Parser]) -> None:
    parser = add_command(
        "generate",
        help="continue one prompt, without a server",
        description="Continues one prompt in this process, and prints the continuation as it comes.",
    )
    _declare_model(parser)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", type=some_text, metavar="TEXT", help="as it is, without a chat template")
    add("--tokens", type=token_ids, metavar="[1,2,3]", help="token ids")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one line of JSON instead: token_ids, text, finish_reason, usage",
    )

    add = parser.add_argument_group(
        "sampling", "What is not given is as the model's makers recommend it, else greedy."
    ).add_argument
    add("--max-new-tokens", type=int, metavar="N", help="(until the model ends or the context is full)")
    add("--temperature", type=float, metavar="X", help="0 = greedy")
    add("--top-k", type=int, metavar="N", help="0 = off")
    add("--top-p", type=float, metavar="X", help="1 = off")
    add("--min-p", type=float, metavar="X", help="0 = off")
    add("--seed", type=int, metavar="N", help="the same seed gives the same continuation")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    add("--ignore-eos", action="store_true", default=None, help="go on where the model would end")
    _declare_engine(parser)


def _declare_profile(add_command: Callable[..., Parser]) -> None:
    parser = add_command(
        "profile",
        help="measure what KV costs on this machine",
        description="Measures what it costs to compute a block of KV and to copy it between the tiers, for "
        "this model on this machine. `continuo serve` finds the result by itself.",
        epilog="Leave the machine idle meanwhile.",
    )
    _declare_model(parser)
    _declare_engine(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write it there instead of where `serve` looks (${XDG_CACHE_HOME:-~/.cache}/continuo/profiles)",
    )


def _declare_caller(add: Callable[..., Any]) -> None:
    add("--token-file", type=Path, metavar="FILE", help="holds your bearer token, and nothing else")
    add("--tls-ca", type=Path, metavar="FILE", help="use TLS and trust this certificate authority (PEM)")


def _declare_model(parser: Parser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        type=model,
        metavar="MODEL",
        help="a folder in Hugging Face format, or a hub id like org/name (the bundled demo model)",
    )
    _declare_hub(parser.add_argument)


def _declare_hub(add: Callable[..., Any]) -> None:
    add("--revision", type=some_text, metavar="REV", help="branch, tag or commit of a hub id (main)")
    add("--offline", action="store_true", help="take a hub id's files from the cache and ask nobody")


def _declare_engine(parser: Parser) -> None:
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: bfloat16 on a GPU and where the CPU computes in it, else float32; the bundled model is "
        "always float32",
    )
    add("--threads", type=positive, metavar="N", help="that compute (OMP_NUM_THREADS, else all cores)")
    add("--block-size", type=int, default=32, metavar="N", help="tokens per KV block: 16, 32 or 64 (32)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--device-kv-tokens", type=positive, metavar="N", help="size of the KV cache (by free memory)")
    add("--device-kv-memory", type=memory, metavar="4GiB", help="the same in bytes")


def _declare_idle_kv(parser: Parser) -> None:
    group = parser.add_argument_group("idle KV")
    add = group.add_mutually_exclusive_group().add_argument
    add(
        "--host-kv-tokens",
        type=count,
        metavar="N",
        help="memory for KV that leaves the device tier; it is copied back when needed (0 = none; on a GPU "
        "by free memory)",
    )
    add("--host-kv-memory", type=memory, metavar="16GiB", help="the same in bytes")
    add = group.add_argument
    add(
        "--policy",
        choices=("retention", "lru", "lru-tail"),
        default="retention",
        help="which idle KV leaves first: what costs least to compute again per second idle, or what was "
        "used longest ago, from its beginning or from its end (retention)",
    )
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help="costs that `continuo profile` measured (the one it keeps for this model and machine, if there "
        "is one, else a quick measurement)",
    )
    add(
        "--eager-stores",
        action="store_true",
        help="copy idle KV to the host at once, not only when the device runs short: bursts find room, at "
        "the price of copies that may be for nothing",
    )
    add(
        "--verify-reloads",
        action="store_true",
        help="keep checksums of KV on the host, and compute again what does not match",
    )


def _declare_load(parser: Parser) -> None:
    add = parser.add_argument_group("load").add_argument
    add(
        "--max-step-tokens",
        type=positive,
        metavar="N",
        help="computed at once; longer prompts take several steps (512, on a GPU 2048)",
    )
    add("--max-concurrent", type=positive, default=32, metavar="N", help="turns computed at once (32)")
    add("--max-queue", type=positive, default=256, metavar="N", help="turns that may wait (256)")
    add("--stateless", action="store_true", help="give the KV cache up after every turn, to compare")


def _declare_data_dir(add: Callable[..., Any]) -> None:
    add(
        "--data-dir",
        metavar="DIR|none",
        help="where conversations are kept (${XDG_STATE_HOME:-~/.local/state}/continuo); "
        "none: they end with the process",
    )


def _use_environment(chosen: argparse.Namespace) -> None:
    """Fills in what the environment decides, and sets what gRPC and OpenMP read when they are imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters reaches us as errors; the rest is noise
    if "data_dir" in chosen:
        chosen.data_dir = data_dir(chosen.data_dir)
    if chosen.command in ("serve", "profile"):
        chosen.profile_dir = _home("XDG_CACHE_HOME", ".cache") / "profiles"
    if getattr(chosen, "revision", None) and not isinstance(chosen.model, str):
        raise argparse.ArgumentTypeError("--revision goes with a hub id like org/name, not with a folder")
    if "threads" in chosen and chosen.command != "bench":
        chosen.model = chosen.model or model_folder(str(BUNDLED_MODEL))
        if chosen.dtype == "auto" and Path(chosen.model).resolve() == BUNDLED_MODEL:
            chosen.dtype = "float32"  # its every token is the same however the KV came about
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if chosen.threads is None and threads.isdecimal():
            chosen.threads = int(threads) or None
        os.environ.setdefault("TRITON_CACHE_DIR", str(_home("XDG_CACHE_HOME", ".cache") / "triton"))
        if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
            os.environ["GOMP_SPINCOUNT"] = SPINS  # read when torch is loaded


def data_dir(text: str | None) -> Path | None:
    if text == "none":
        return None
    if text is not None:
        return Path(text).expanduser().absolute()
    return _home("XDG_STATE_HOME", ".local/state")


def _home(variable: str, default: str) -> Path:
    """The folder for files of ours that `variable` decides; `default` is below the user's home."""
    named = Path(os.environ.get(variable, ""))
    return (named if named.is_absolute() else Path.home() / default) / "continuo"


if __name__ == "__main__":
    sys.exit(main())
