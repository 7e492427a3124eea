"""What a Launch becomes on a GPU that need not be there, read from its machine code."""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels.gpu.launch import Launch

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_WARP = 32


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes of a multiprocessor, and the instructions that it consists of."""

    registers: int  # of each thread
    spilled_bytes: int  # of each thread: its stack and its local memory
    shared_bytes: int  # of each block of threads
    threads: int  # in a block
    instructions: Counter[str]  # how often each stands in the code, with its modifiers: "LDG.E.128"

    def count(self, instruction: str, *modifiers: str) -> int:
        """How many stand in the code, with these modifiers among theirs: count("LDG", "128")."""
        wanted = set(modifiers)
        return sum(
            times
            for text, times in self.instructions.items()
            if text.split(".")[0] == instruction and wanted <= set(text.split(".")[1:])
        )


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile as a launch on that architecture does (80 for 8.0), on any machine; Triton caches the result.

    Raises ValueError where the Launch and its kernel's parameters differ, RuntimeError where Triton
    interprets or its tools are missing, and what Triton raises for a kernel that it cannot compile.
    """
    kernel = launch.kernel
    if triton.knobs.runtime.interpret or not isinstance(kernel, JITFunction):
        raise RuntimeError(f"{launch.name} cannot be compiled by a process in which Triton interprets")
    names = kernel.arg_names
    given = [*launch.signature, *launch.constants]
    if set(given) != set(names) or given[: len(launch.signature)] != names[: len(launch.signature)]:
        raise ValueError(
            f"signature and constants of {launch.name} must be the parameters of {kernel.__name__}, {names}, "
            f"got {list(launch.signature)} and {list(launch.constants)}"
        )
    types = launch.signature | dict.fromkeys(launch.constants, "constexpr")
    aligned = [
        parameter.num
        for parameter in kernel.params
        if types[parameter.name].startswith("*")
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs=launch.constants,
        attrs={(at,): [["tt.divisibility", 16]] for at in aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, _WARP), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    (line,) = (line for line in usage.splitlines() if "REG:" in line)
    numbers = {word: int(value) for word, value in re.findall(r"(\w+):(\d+)", line)}
    return Resources(
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=numbers["SHARED"] + done.metadata.shared,
        threads=done.metadata.num_warps * _WARP,
        instructions=Counter(_INSTRUCTION.findall(code)),
    )


def _tool(name: str, *arguments: str) -> str:
    """What one of the tools that come with Triton, or are on PATH, prints."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = own if own.exists() else shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is neither in {own.parent} nor on PATH")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
