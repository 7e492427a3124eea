"""Every kernel for GPUs as real models launch it, compiled for sm_80 and sm_90 on a machine without a GPU: it
spills nothing, fits a multiprocessor, and multiplies, copies and loads by the instructions it is meant to.
"""

import os
import pkgutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="needs triton, which is for Linux on x86-64", exc_type=ImportError
)

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import kernels.gpu  # noqa: E402
from kernels.gpu.compiled import Resources, compile_launch  # noqa: E402
from kernels.gpu.launch import TYPES, Launch, pointer  # noqa: E402
from tests.kernels.launches import compiled_for, specialised  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    found.name: import_module(f"kernels.gpu.{found.name}")
    for found in pkgutil.iter_modules(kernels.gpu.__path__)
}
SHIPPED = [
    (name, launch)
    for name, module in MODULES.items()
    if hasattr(module, "shipped")
    for launch in module.shipped()
]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 64 << 10
ITEM_BYTES = {pointer(dtype): dtype.itemsize for dtype in TYPES}
WIDE = dict.fromkeys(("norm", "gate", "rope", "gather"), ("LDG", "STG")) | {"merge": ("LDG",)}
"""What moves 16 bytes at a time.  A merged row is small beside what it is merged from."""


def often() -> list[tuple[str, Launch]]:
    """What every run of the tests compiles: the first form of each kernel, six of a module's products."""
    kept, seen = [], Counter[object]()
    for name, launch in SHIPPED:
        alike, most = (launch.kernel, 1) if launch.unit == "none" else (name, 6)
        seen[alike] += 1
        if seen[alike] <= most:
            kept.append((name, launch))
    return kept


def cases() -> list[object]:
    return [
        pytest.param(
            name,
            launch,
            capability,
            id=f"{launch.name}-sm_{capability}",
            marks=[] if (name, launch) in often() else pytest.mark.heavy,
        )
        for name, launch in SHIPPED
        for capability in SHARED_BYTES
    ]


def complaints(module: str, launch: Launch, capability: int, found: Resources) -> list[str]:
    """What is wrong with a compiled kernel of that module of kernels.gpu."""
    wrong = []
    if found.spilled_bytes or found.count("LDL") or found.count("STL"):
        wrong.append(f"spills {found.spilled_bytes} bytes of each thread")
    if (needed := -(-found.registers // 8) * 8 * found.threads) > REGISTERS:
        wrong.append(f"needs {needed} of {REGISTERS} registers")
    if found.shared_bytes > SHARED_BYTES[capability]:
        wrong.append(f"needs {found.shared_bytes} of {SHARED_BYTES[capability]} bytes of shared memory")
    if launch.unit != "none":
        instruction = "HGMMA" if (launch.unit, capability) == ("wgmma", 90) else "HMMA"
        if not found.count(instruction):
            wrong.append(f"has no {instruction}")
    if module == "attention":
        tile = launch.constants["ROWS"] * launch.constants["WIDTH"] * ITEM_BYTES[launch.signature["q"]]
        if not found.count("LDGSTS"):
            wrong.append("copies nothing asynchronously")
        if found.count("LDG", "128") * found.threads * 16 > tile:
            wrong.append("loads more than queries by itself")
    moves = WIDE.get(module, ())
    wrong += [f"has no {word} of 16 bytes" for word in moves if not found.count(word, "128")]
    head = f"{launch.name} on sm_{capability} ({found.registers} registers x {found.threads} threads)"
    return [f"{head} {what}" for what in wrong]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize(("module", "launch", "capability"), cases())
def test_a_kernel_fits_and_uses_the_units_it_is_meant_to(module, launch, capability):
    assert not complaints(module, launch, capability, compile_launch(launch, capability))


def test_every_kernel_is_among_the_shipped_and_names_are_unique():
    found = {
        value.fn: name
        for name, module in MODULES.items()
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }
    called = {word for kernel in found for word in kernel.__code__.co_names}
    shipped = {launch.kernel.fn for _, launch in SHIPPED}
    forgotten = {
        f"{name}.{kernel.__name__}" for kernel, name in found.items() if kernel.__name__ not in called
    }
    assert not forgotten - {f"{found[kernel]}.{kernel.__name__}" for kernel in shipped}
    names = Counter(launch.name for _, launch in SHIPPED)
    assert "" not in names and set(names.values()) <= {1}, names


def test_few_enough_are_compiled_every_day():
    assert len(often()) * len(SHARED_BYTES) <= 40


# That the harness can fail.


@triton.jit(do_not_specialize=["num_tiles"])
def product(
    q, keys, out, num_tiles, ROWS: tl.constexpr, WIDTH: tl.constexpr, FACTOR: tl.constexpr, TERM: tl.constexpr
):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(0, num_tiles):
        x = tl.load(q + (tile * ROWS + rows[:, None]) * WIDTH + columns[None])
        y = tl.load(keys + (tile * WIDTH + columns[:, None]) * WIDTH + columns[None])
        total = tl.dot(x, y, total, input_precision="ieee")
    total *= FACTOR
    if TERM is not None:
        total += TERM
    tl.store(out + rows[:, None] * WIDTH + columns[None], total.to(out.dtype.element_ty))


def product_of(
    dtype: torch.dtype = torch.bfloat16, size: int = 64, num_warps: int = 4, **changes: object
) -> Launch:
    signature = {"q": pointer(dtype), "keys": pointer(dtype), "out": pointer(dtype), "num_tiles": "i32"}
    given = {"unit": "wgmma", "constants": {"ROWS": 64, "WIDTH": size, "FACTOR": 1.5, "TERM": None}} | changes
    return Launch(kernel=product, signature=signature, num_warps=num_warps, name="product", **given)


def test_a_kernel_as_it_should_be_has_no_complaints():
    """Constants may be None or no integers."""
    for capability, instruction in ((80, "HMMA"), (90, "HGMMA")):
        found = compile_launch(product_of(), capability)
        assert complaints("attention", product_of(), capability, found) == []
        assert found.count(instruction) and found.count("LDGSTS", "128") and found.threads == 128
        assert found.count(instruction, "BF16") and not found.count(instruction, "F16")


@pytest.mark.parametrize(
    ("launch", "capability", "complaint"),
    [
        (product_of(size=128, num_warps=1), 80, "spills"),
        (product_of(size=128, num_stages=5), 80, "bytes of shared memory"),
        (product_of(dtype=torch.float32), 90, "has no HGMMA"),
        (product_of(dtype=torch.float32), 80, "has no HMMA"),
        (product_of(num_stages=1), 90, "copies nothing asynchronously"),
        (product_of(num_stages=1), 80, "loads more than queries by itself"),
    ],
)
def test_a_kernel_that_is_not_as_it_should_be_is_found(launch, capability, complaint):
    told = complaints("attention", launch, capability, compile_launch(launch, capability))
    assert any(complaint in line and f"product on sm_{capability}" in line for line in told), told


def test_narrow_accesses_and_too_many_registers_are_found():
    found = Resources(
        registers=129,
        spilled_bytes=0,
        shared_bytes=0,
        threads=512,
        instructions=Counter({"LDG.E.64": 1, "STG.E.128": 1}),
    )
    fits, narrow = complaints("norm", product_of(unit="none"), 90, found)
    assert "needs 69632 of 65536 registers" in fits and "no LDG of 16 bytes" in narrow


def test_constants_and_signature_must_be_the_parameters():
    with pytest.raises(ValueError, match=r"of product must be .*'TERM'\], got .*'WIDTH'\]"):
        compile_launch(product_of(constants={"ROWS": 64, "WIDTH": 64}), 80)


def test_a_process_in_which_triton_interprets_compiles_nothing():
    code = (
        "import tests.kernels.test_gpu_compile as t\n"
        "try: t.compile_launch(t.product_of(), 80)\n"
        "except RuntimeError as error: print(error)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "product cannot be compiled by a process in which Triton interprets\n", (
        ended.stderr
    )


def test_arguments_that_would_be_compiled_anew_are_told_apart():
    x = torch.zeros(64 * 64 + 1, dtype=torch.bfloat16)
    launch = product_of()
    assert all(specialised(launch, x, x, x, number) == compiled_for(launch) for number in (1, 7, 16))
    for others in ((x, x, x, 2**31), (x, x, x[1:], 1), (x, x, x.float(), 1), (x, x, None, 1)):
        assert specialised(launch, *others) != compiled_for(launch)
