"""What is launched is what was compiled: nothing is compiled while serving, whatever a step is like."""

import pkgutil

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which is for Linux on x86-64", exc_type=ImportError)

import kernels.gpu  # noqa: E402
from kernels.gpu.launch import Launch  # noqa: E402
from tests.kernels.cases import paged  # noqa: E402
from tests.kernels.launches import (  # noqa: E402
    HEADS,
    KV_HEADS,
    LAUNCHERS,
    SIZE,
    SLOTS,
    attend,
    compiled_for,
    copy,
    draw,
    instead_of_launching,
    norm,
    rotate,
    silu,
    specialised,
    take_highest,
)

ROWS = (1, 2, 7, 16, 33, 64)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_steps_of_any_size_launch_the_forms_that_were_compiled(name):
    forms: list[set[str]] = []

    def check(launch: Launch, args: tuple[object, ...]) -> None:
        assert specialised(launch, *args) == compiled_for(launch), launch.name
        forms[-1].add(launch.name)

    with instead_of_launching(check):
        for rows in ROWS:
            forms.append(set())
            LAUNCHERS[name](rows)
    assert all(forms)
    if not name.startswith("attention"):
        assert len(set.union(*forms)) <= 2 and all(form == forms[0] for form in forms), forms
    else:  # the tiles follow from the lengths of segments
        assert len(set.union(*forms)) <= 5, forms


def test_every_launcher_is_called_by_these_tests():
    launched: set[object] = set()
    with instead_of_launching(lambda launch, _: launched.add(launch.kernel)):
        for call in LAUNCHERS.values():
            call(3)
            call(64)
    modules = [
        __import__(f"kernels.gpu.{found.name}", fromlist=["shipped"])
        for found in pkgutil.iter_modules(kernels.gpu.__path__)
    ]
    shipped = {
        launch.kernel for module in modules if hasattr(module, "shipped") for launch in module.shipped()
    }
    assert shipped <= launched, {kernel.__name__ for kernel in shipped - launched}


def shifted(x: Tensor) -> Tensor:
    """The same, one element behind a multiple of 16 bytes."""
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)


TABLES = paged([3, 1], [2000, 5], heads=HEADS, kv_heads=KV_HEADS, size=SIZE, slots=SLOTS).meta
COLUMNS = [(draw, name, torch.ones(3)) for name in ("temperature", "top_p", "min_p")]
COLUMNS += [(draw, name, torch.ones(3, dtype=torch.int64)) for name in ("top_k", "seed", "position", "out")]
OFFSETS = [(copy, name, 64 * torch.arange(3)) for name in ("to_offsets", "source_offsets")]
PLACES = [(attend, name, getattr(TABLES, name)) for name in ("q_indptr", "first_pos", "block_tables")]


@pytest.mark.parametrize(
    ("call", "name", "given"),
    [
        *COLUMNS,
        *OFFSETS,
        *PLACES,
        (draw, "logits", torch.ones(3, 1000)),
        (take_highest, "logits", torch.ones(3, 1000)),
        (rotate, "slots", torch.arange(3)),
        (norm, "weight", torch.ones(64)),
    ],
)
def test_what_begins_anywhere_is_refused_or_launches_the_same_form(call, name, given):
    def check(launch: Launch, args: tuple[object, ...]) -> None:
        assert specialised(launch, *args) == compiled_for(launch), launch.name

    assert shifted(given).data_ptr() % 16
    with instead_of_launching(check):
        try:
            call(3, **{name: shifted(given)})
        except ValueError as error:
            assert f"{name} must begin at a multiple of 16 bytes" in str(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_launches_are_as_compiled(dtype):
    kinds: set[str] = set()

    def check(launch: Launch, args: tuple[object, ...]) -> None:
        told = specialised(launch, *args)
        assert told == compiled_for(launch), launch.name
        kinds.update(kind for kind, _ in told.values())

    with instead_of_launching(check):
        norm(3, x=torch.ones(3, 64, dtype=dtype), weight=torch.ones(64, dtype=dtype))
        silu(3, torch.ones(3, 64, dtype=dtype))
        attend(1, q=torch.ones(2, 4, 16, dtype=dtype), kv=torch.ones(140, 2, 2, 16, 16, dtype=dtype))
    assert {"*bf16" if dtype == torch.bfloat16 else "*fp16"} == kinds - {"i32", "fp32", "*i32", "*fp32"}
