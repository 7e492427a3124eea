"""How the C kernels come to be: built once, never by strangers; when they cannot be, the reason is told."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import kernels.native.build as native_build
from kernels import dispatch
from kernels.native.build import BuildError, build, supported
from kernels.paged_attention import paged_attention, paged_attention_ref
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.silu_mul import silu_mul, silu_mul_ref
from tests.kernels.cases import builds, needs_compiler, needs_native, paged


@pytest.fixture
def fresh_choice() -> object:
    """Lets dispatch decide again, in this test and in the next."""
    dispatch._default.cache_clear()
    dispatch._native.cache_clear()
    yield
    dispatch._default.cache_clear()
    dispatch._native.cache_clear()


def pretend_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the sources in `folder`, with nothing built yet and temporary files beside it."""
    for file in (*native_build._SOURCES, *native_build._HEADERS):
        shutil.copy(native_build._HERE / file, folder)
    (folder / "tmp").mkdir()
    monkeypatch.setattr(native_build, "_HERE", folder)
    monkeypatch.setattr(native_build.tempfile, "tempdir", str(folder / "tmp"))


@needs_native
def test_the_best_build_is_chosen_and_named(fresh_choice: object) -> None:
    assert dispatch.implementation() == "native"
    assert dispatch.describe() == f"native {supported()[0].title}"


@needs_native
def test_use_changes_the_implementation_for_its_body_only() -> None:
    before = dispatch.describe()
    with dispatch.use("torch"):
        assert dispatch.implementation() == "torch" and dispatch.library() is None
        with dispatch.use("native", supported()[-1]):
            assert dispatch.describe() == f"native {supported()[-1].title}"
    assert dispatch.describe() == before


@needs_native
def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    assert list(builds())
    runtimes = set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\S*", Path("/proc/self/maps").read_text()))
    assert len(runtimes) == 1, runtimes


def test_without_a_compiler_torch_runs_and_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_choice: object
) -> None:
    pretend_package(tmp_path, monkeypatch)
    monkeypatch.setattr(native_build, "cpu_flags", lambda: native_build.INSTRUCTION_SETS[-1].cpu_flags)
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert dispatch.implementation() == "torch"
    assert dispatch.describe() == f"torch (no C compiler found; {native_build.HOW_TO_GET_ONE})"


def test_a_cpu_without_avx2_runs_torch(monkeypatch: pytest.MonkeyPatch, fresh_choice: object) -> None:
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset({"sse4_2", "avx", "fma"}))
    monkeypatch.setattr(dispatch, "load", lambda isa: pytest.fail(f"loaded {isa.name}"))
    assert dispatch.describe() == "torch (native kernels need Linux on x86-64 with AVX2)"
    x = torch.randn(3, 8)
    assert torch.equal(rms_norm(x, x[0], 1e-6), rms_norm_ref(x, x[0], 1e-6))
    assert torch.equal(silu_mul(x), silu_mul_ref(x))
    case = paged([2], [30])
    out, _ = paged_attention(case.q, case.kv, case.meta, case.scale)
    assert torch.equal(out, paged_attention_ref(case.q, case.kv, case.meta, case.scale)[0])


@needs_native
@needs_compiler
def test_a_failed_compilation_is_told_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_choice: object
) -> None:
    pretend_package(tmp_path, monkeypatch)
    (tmp_path / "simd.h").write_text("#error these vectors are broken\n")
    assert dispatch.implementation() == "torch"
    assert "these vectors are broken" in dispatch.describe()


@needs_native
@needs_compiler
def test_an_instruction_set_that_fails_gives_way_to_the_next_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_choice: object
) -> None:
    if len(supported()) < 2:
        pytest.skip("this CPU runs one build only")
    first, second = supported()[:2]
    load = dispatch.load

    def refuse(isa: native_build.InstructionSet) -> object:
        if isa == first:
            raise OSError("not today")
        return load(isa)

    monkeypatch.setattr(dispatch, "load", refuse)
    assert dispatch.describe() == f"native {second.title}; {first.title}: not today"


@needs_native
@needs_compiler
def test_a_build_is_kept_and_a_changed_source_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_package(tmp_path, monkeypatch)
    isa = supported()[-1]
    built = build(isa)
    assert built.parent == tmp_path / "_build"
    first = built.stat().st_mtime_ns
    assert build(isa) == built and built.stat().st_mtime_ns == first
    with (tmp_path / "rowwise.c").open("a") as source:
        source.write("/* changed */\n")
    assert build(isa) != built
    assert len(list(built.parent.iterdir())) == 2, "temporary files were left"


@needs_native
@needs_compiler
def test_a_build_with_sanitizers_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_package(tmp_path, monkeypatch)
    plain = build(supported()[-1])
    monkeypatch.setattr(
        native_build, "_SANITIZER_FLAGS", ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    )
    checked = build(supported()[-1])
    assert checked != plain and checked.read_bytes() != plain.read_bytes()


@needs_native
@needs_compiler
def test_a_library_that_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_package(tmp_path, monkeypatch)
    isa = supported()[-1]
    (tmp_path / "_build").mkdir()
    (tmp_path / "_build").chmod(0o777)
    private = tmp_path / "tmp" / f"continuo-kernels-{os.getuid()}"
    assert build(isa).parent == private
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("built where others can write"))
    with pytest.raises(BuildError, match="no folder to build in"):
        build(isa)


def test_elsewhere_than_linux_on_x86_torch_runs(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: object
) -> None:
    monkeypatch.setattr(dispatch, "supported", lambda: ())
    assert dispatch.implementation() == "torch"
    assert "Linux on x86-64" in dispatch.describe()
    assert torch.get_num_threads() >= 1
