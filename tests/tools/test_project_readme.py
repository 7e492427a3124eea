"""The README: its commands, its example, its links, and numbers that were measured."""

import asyncio
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from tools import readme_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_every_link_leads_somewhere() -> None:
    assert len(README.splitlines()) <= 250
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


def test_its_numbers_are_made_from_the_results() -> None:
    assert readme_table.with_numbers(README) == README, "run: python -m tools.readme_table --write"


def test_the_first_two_commands_can_be_run() -> None:
    commands = [line.split()[0] for line in blocks("bash")[0].splitlines()]
    assert commands == ["./tools/demo.sh", "./tools/test.sh"]
    for command in commands:
        assert os.access(ROOT / command, os.X_OK)
        subprocess.run(["bash", "-n", ROOT / command], check=True)


def test_the_other_commands_exist_with_their_flags(continuo) -> None:
    lines = [line.partition("#")[0].split() for block in blocks("bash")[1:] for line in block.splitlines()]
    assert lines
    for words in lines:
        assert words[0] == ".venv/bin/continuo"
        help_text = continuo(words[1], "--help")
        assert help_text.returncode == 0
        for flag in (word for word in words[2:] if word.startswith("--")):
            assert flag in help_text.stdout


def test_the_python_example_runs_as_it_stands(
    serve, talking_model, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks("python")
    imports, _, body = example.partition("\n\n")
    server = serve(talking_model, "--data-dir", "none")
    code = f"{imports}\n\nasync def main():\n{textwrap.indent(body, '    ')}"
    names: dict = {}
    exec(compile(code.replace("localhost:50051", server.address), "README.md", "exec"), names)
    asyncio.run(names["main"]())
    said, cached = capsys.readouterr().out.rsplit(maxsplit=1)
    assert said and int(cached) > 0


def test_the_version_is_one_everywhere(continuo) -> None:
    from kernels import __version__

    assert continuo("--version").stdout.strip() == f"continuo {__version__}"
    assert f"\n{__version__}:" in README
