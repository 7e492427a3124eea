"""Which device computes, and what is said where it cannot be the one that was asked for."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import devices
from engine.config import EngineConfig
from engine.devices import gpu_kernels, gpu_machine, gpu_obstacle, with_device
from engine.errors import ConfigError

DRIVER_LINE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Jan 7\nGCC version: 13\n"
MODEL = Path("m")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "version"
    path.write_text(DRIVER_LINE)
    monkeypatch.setattr(devices, "DRIVER", path)
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch sees an H200."""
    (tmp_path / "Python.h").touch()
    for name, answer in {
        "is_available": True,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H200",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is built for CUDA and sees no GPU."""

    def never() -> None:
        raise RuntimeError("No CUDA GPUs are available.\nMore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", never)


@pytest.fixture
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_that_can_be_used_is_used(gpu: None, asked: Any) -> None:
    assert with_device(EngineConfig(MODEL, device=asked)).device == "cuda"


def test_the_cpu_computes_where_it_is_asked_to_whatever_else_there_is(gpu: None) -> None:
    config = EngineConfig(MODEL, device="cpu")
    assert with_device(config) is config


def test_without_a_gpu_auto_is_the_cpu_and_says_nothing(
    cpu_build: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "none")
    assert with_device(EngineConfig(MODEL)).device == "cpu"
    assert caplog.messages == []


def test_a_gpu_that_lies_idle_is_not_passed_over_in_silence(
    cpu_build: None, driver: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert with_device(EngineConfig(MODEL)).device == "cpu"
    (message,) = caplog.messages
    assert "the CPU computes, although there is an NVIDIA driver: torch" in message


def test_a_build_of_torch_without_cuda_is_named_with_what_else_was_found(
    cpu_build: None, driver: Path, tmp_path: Path
) -> None:
    for path, found in (
        (driver, "NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Jan 7"),
        (tmp_path / "none", "there is no NVIDIA driver"),
    ):
        complaint = gpu_obstacle(path)
        assert complaint is not None
        assert f"torch {torch.__version__} is built for CPUs only, and {found}; remove .venv" in complaint


def test_a_missing_driver_is_told_apart_from_one_that_shows_no_gpu(
    cuda_build: None, driver: Path, tmp_path: Path
) -> None:
    absent = gpu_obstacle(tmp_path / "none")
    assert absent is not None
    assert f"there is no NVIDIA driver ({tmp_path / 'none'} is absent; torch says: No CUDA GPUs" in absent
    assert "--gpus all" in absent
    hidden = gpu_obstacle(driver)
    assert hidden is not None
    assert "built for CUDA 13.0, finds no GPU (No CUDA GPUs are available) with the driver NVIDIA" in hidden
    assert "CUDA_VISIBLE_DEVICES" in hidden


def test_a_gpu_that_the_kernels_are_not_made_for_is_refused_or_passed_over(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    complaint = "--device cuda: NVIDIA H200 has compute capability 7.5, and kernels need 8.0; or use --device"
    with pytest.raises(ConfigError, match=complaint):
        with_device(EngineConfig(MODEL, device="cuda"))
    assert with_device(EngineConfig(MODEL)).device == "cpu"


def test_without_triton_there_are_no_kernels_for_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton, in which the kernels are written, is not installed"):
        with_device(EngineConfig(MODEL, device="cuda"))


def test_without_what_triton_builds_with_there_are_none_either(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name, scheme: "/no/headers")
    with pytest.raises(ConfigError, match=r"/no/headers/Python.h is absent .*; or use --device cpu"):
        with_device(EngineConfig(MODEL, device="cuda"))
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"finds no C compiler \(gcc, clang\); or use --device cpu"):
        with_device(EngineConfig(MODEL, device="cuda"))


def test_the_compiler_and_the_headers_are_those_that_triton_takes(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one that CC names, and no other; headers of the prefix, where Ubuntu would have local ones."""
    schemes = {"posix_prefix": str(tmp_path), "posix_local": "/no/headers"}
    monkeypatch.setattr(devices.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name, scheme: schemes[scheme])
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if name == "my-cc" else None)
    monkeypatch.setenv("CC", "my-cc")
    assert gpu_obstacle() is None
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if name == "gcc" else None)
    assert "finds no C compiler (my-cc)" in (gpu_obstacle() or "")
    monkeypatch.delenv("CC")
    assert gpu_obstacle() is None


def test_what_only_one_device_does_is_refused_on_the_other(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert with_device(EngineConfig(MODEL, dtype="float16")).dtype == "float16"
    with pytest.raises(ConfigError, match="--verify-reloads is not for a GPU"):
        with_device(EngineConfig(MODEL, verify_reloads=True))
    with pytest.raises(ConfigError, match="--verify-reloads is not for a GPU"):
        EngineConfig(MODEL, device="cuda", verify_reloads=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "none")
    assert with_device(EngineConfig(MODEL, verify_reloads=True)).verify_reloads
    for device in ("auto", "cpu"):
        with pytest.raises(ConfigError, match="dtype float16 has no fast path on CPUs"):
            with_device(EngineConfig(MODEL, device=device, dtype="float16"))  # type: ignore[arg-type]


def test_costs_of_a_gpu_are_those_of_its_kind_its_machine_and_its_kernels(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(devices, "processor", lambda: "AMD EPYC 9B45")
    assert gpu_machine() == "NVIDIA H200, capability 9.0, beside AMD EPYC 9B45"
    assert gpu_kernels().startswith("triton 3.") and torch.__version__ in gpu_kernels()
