"""What the demo shows: acts with a line of narration, a few lines of dialogue, and the scoreboard."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.demo_play import Exchange

INDENT = "   "
WIDTH = 80  # columns, the least that a terminal has


class Screen:
    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._num_acts = 0

    def title(self, text: str, below: str) -> None:
        self._console.print(Text(text, "bold"), Text(below, "dim"), sep="\n")

    def act(self, text: str) -> None:
        self._num_acts += 1
        self._console.print(Text.assemble("\n", (f"{self._num_acts}  ", "bold cyan"), (text, "bold")))

    def note(self, text: str) -> None:
        self._console.print(Text(INDENT + text))

    def dialogue(self, exchange: Exchange, verdict: bool | None = None) -> None:
        """What was said and answered; `verdict` adds whether that was right."""
        mark = {True: ("✓ ", "green"), False: ("✗ ", "red"), None: ("› ", "cyan")}[verdict]
        said, answered = (
            shorten(text, WIDTH - len(INDENT) - 2, placeholder=" …")
            for text in (exchange.step.text, exchange.turn.text)
        )
        self._console.print(Text.assemble(INDENT, mark, said, f"\n{INDENT}  ", (answered, "italic")))

    @contextmanager
    def counting(self, what: str, num: int) -> Iterator[Callable[[], None]]:
        """While inside, a line that counts the calls of the yielded function; on a terminal only."""
        if not self._console.is_terminal:
            yield lambda: None
            return
        done = 0
        with self._console.status(f"[dim]{what}[/dim]") as status:

            def count() -> None:
                nonlocal done
                done += 1
                status.update(f"[dim]{what}, {done} of {num}[/dim]")

            yield count

    def scoreboard(self, rows: Sequence[tuple[str, str, str]]) -> None:
        table = Table(title_style="bold", header_style="bold")
        table.add_column("")
        table.add_column("Continuo", justify="right", style="green")
        table.add_column("re-reading every turn", justify="right")
        for row in rows:
            table.add_row(*row)
        self._console.print("", table, "", sep="\n")

    def verdict(self, failures: Sequence[str], judged: bool) -> None:
        for failure in failures:
            self._console.print(Text(f"✗ {failure}", "bold red"))
        if judged and not failures:
            self._console.print(Text("✓ Nothing was forgotten, and nothing changed.", "bold green"))
