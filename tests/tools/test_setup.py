"""Set-up on a stranger's machine, played with a stand-in for Python so that nothing is downloaded.

The stand-in answers as `python3.11` and, once it has "made" .venv, as .venv/bin/python: it notes every call
of pip and fails those that the test names.
"""

import shutil
import socket
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from tools import pick_torch

Fact = Callable[[], bool]

ROOT = Path(__file__).resolve().parents[2]
TOOLS = tuple(
    f"tools/{name}" for name in ("setup.sh", "constraints.txt", "pick_torch.py", "generate_proto.sh")
)

STAND_IN = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    -V) echo "Python 3.11.9" ;;
    "-m venv .venv")
        mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "$PWD/.venv" >.venv/bin/activate ;;
    *pick_torch*) printf '%s\\n%s\\n' "$TORCH_INDEX" "torch==2.13.0 (as the test says)" ;;
    *importlib.metadata*) echo "torch==2.13.0+cpu" ;;
    "-m kernels.native.build")
        echo compiled >>"$CALLS"
        [ -z "$NO_COMPILER" ] || { echo "kernels: torch only (no compiler)" >&2; exit 1; }
        echo "kernels: native AVX2, somewhere.so, 1.5 s" ;;
    -c*) ;;
    "-m pip install"*)
        echo "$*" >>"$CALLS"
        case "$*" in *"${FAILING:-nothing fails}"*) echo "ERROR: no route to the index"; exit 1 ;; esac ;;
esac
"""


COREUTILS = "bash cat cksum cp cut date dirname env find grep mkdir pwd rm sed sh sort tail xargs".split()


class Machine:
    """A fresh checkout on a machine with coreutils and, unless `python` is False, a Python 3.11 of sorts."""

    def __init__(self, folder: Path, python: bool = True) -> None:
        self.checkout, self.calls, self.commands = folder / "checkout", folder / "calls", folder / "bin"
        self.commands.mkdir()
        for command in COREUTILS:
            (self.commands / command).symlink_to(shutil.which(command))
        if python:
            (self.commands / "python3.11").write_text(STAND_IN)
            (self.commands / "python3.11").chmod(0o755)
        for name in ("pyproject.toml", "kernels/__init__.py", *TOOLS):
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name)
        self.write("kernels/native/attention.c", "int first;")

    def write(self, name: str, text: str) -> None:
        (self.checkout / name).parent.mkdir(exist_ok=True)
        (self.checkout / name).write_text(text)

    def set_up(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", "tools/setup.sh", *arguments],
            cwd=self.checkout,
            env={"PATH": str(self.commands), "CALLS": str(self.calls), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def called(self) -> list[str]:
        """What the last set-up installed and compiled, in order."""
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_four_steps_are_shown_with_their_times(machine: Machine) -> None:
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert [line[:5] for line in shown] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert all(line.endswith(" s") for line in shown)
    assert done.stderr == ""


def test_a_second_set_up_does_nothing_and_says_nothing(machine: Machine) -> None:
    machine.set_up()
    again = machine.set_up()
    assert (again.returncode, again.stdout, machine.called()) == (0, "", [])


def test_torch_is_installed_first_and_held_by_what_follows(machine: Machine) -> None:
    machine.set_up(TORCH_INDEX="https://index.example/cpu")
    torch, packages, _ = machine.called()
    assert torch.endswith("--no-deps --index-url https://index.example/cpu torch==2.13.0")
    assert "index.example" not in packages and "-c .venv/torch.txt" in packages
    assert (machine.checkout / ".venv/torch.txt").read_text() == "torch==2.13.0+cpu\n"


def test_the_default_index_is_left_to_pip(machine: Machine) -> None:
    machine.set_up()
    assert machine.called()[0].endswith("install -c tools/constraints.txt torch==2.13.0")


def test_serving_needs_no_development_packages_and_development_covers_serving(machine: Machine) -> None:
    machine.set_up()
    assert any(".[server]" in call for call in machine.called())
    machine.set_up("--dev")
    assert any(".[dev]" in call for call in machine.called())
    assert any("--target .venv/protoc grpcio-tools==" in call for call in machine.called())
    machine.set_up()
    assert machine.called() == []


def test_changed_constraints_are_installed(machine: Machine) -> None:
    machine.set_up()
    machine.write("tools/constraints.txt", (ROOT / "tools/constraints.txt").read_text() + "another==1.0\n")
    machine.set_up()
    assert any("-e .[server]" in call for call in machine.called())


def test_a_changed_kernel_is_rebuilt_without_installing_anything(machine: Machine) -> None:
    machine.set_up()
    machine.write("kernels/native/attention.c", "int second;")
    assert machine.set_up().stdout == "[4/4] native kernel ... native AVX2, 0 s\n"
    assert machine.called() == ["compiled"]


def test_a_moved_checkout_is_set_up_anew(machine: Machine) -> None:
    machine.set_up()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    machine.set_up()
    assert any("-e .[server]" in call for call in machine.called())
    assert (machine.checkout / ".venv/bin/activate").read_text() == f"{machine.checkout}/.venv\n"


def test_a_failed_install_shows_the_end_of_the_log_and_what_to_do_and_is_tried_again(
    machine: Machine,
) -> None:
    failed = machine.set_up(FAILING="-e .")
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1] == "[3/4] packages for continuo[server] ... failed"
    last_line, advice = failed.stderr.splitlines()
    assert last_line.strip() == "ERROR: no route to the index"
    assert "Check the network" in advice and "run this again" in advice and ".venv/setup.log" in advice
    assert machine.set_up().returncode == 0
    assert any("-e .[server]" in call for call in machine.called())


def test_without_a_compiler_set_up_succeeds_and_says_which_kernels_serve(machine: Machine) -> None:
    done = machine.set_up(NO_COMPILER="1")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[4/4] native kernel ... torch only (no compiler), 0 s"


def test_without_python_the_sentence_names_the_version_and_nothing_is_left_behind(tmp_path: Path) -> None:
    machine = Machine(tmp_path, python=False)
    done = machine.set_up()
    assert done.returncode == 1
    assert done.stderr.startswith("Continuo needs Python 3.11 or newer: install it")
    assert not (machine.checkout / ".venv").exists()


def never() -> bool:
    raise AssertionError("this fact was not needed")


@pytest.mark.parametrize(
    ("override", "facts", "index", "reason"),
    [
        ("https://mine", (never, never, never), "https://mine", "CONTINUO_TORCH_INDEX"),
        ("", (lambda: True, never, never), "", "NVIDIA driver"),
        ("", (lambda: False, lambda: False, never), "", "CPU build"),
        ("", (lambda: False, lambda: True, lambda: True), pick_torch.CPU_INDEX, "CPU build"),
        ("", (lambda: False, lambda: True, lambda: False), "", "about 2.7 GB"),
    ],
)
def test_torch_comes_from_the_nearest_index_that_suits_the_machine(
    override: str, facts: tuple[Fact, Fact, Fact], index: str, reason: str
) -> None:
    chosen, why = pick_torch.choose(override, *facts)
    assert chosen == index
    assert reason in why


def test_a_cuda_build_is_told_by_what_it_requires() -> None:
    common = ["filelock", "sympy>=1.13.3", "jinja2"]
    assert not pick_torch.requires_cuda(common)
    assert pick_torch.requires_cuda([*common, 'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"'])
    assert pick_torch.requires_cuda([*common, 'cuda-toolkit[cublas]==13.0.3; platform_system == "Linux"'])


def test_an_index_that_refuses_the_connection_does_not_answer() -> None:
    with socket.socket() as bound:  # bound but not listening: a connection is refused
        bound.bind(("127.0.0.1", 0))
        assert not pick_torch.answers(f"http://127.0.0.1:{bound.getsockname()[1]}")


def test_the_constraints_pin_one_torch_without_a_build_tag() -> None:
    pin = pick_torch.pinned((ROOT / "tools/constraints.txt").read_text())
    assert pin.startswith("torch==") and "+" not in pin
    assert pick_torch.installed(pin) == (pin == "torch==" + version("torch").partition("+")[0])
