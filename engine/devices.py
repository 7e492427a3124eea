"""Which device computes: what was asked for, against what this machine has."""

import importlib
import importlib.util
import logging
import shutil
import sysconfig
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.cost_profile import processor
from engine.errors import ConfigError
from kernels.gpu.launch import LEAST_CAPABILITY, chosen_compiler

DRIVER = Path("/proc/driver/nvidia/version")
_COMPILERS = "gcc", "clang"
_logger = logging.getLogger(__name__)


def with_device(config: EngineConfig) -> EngineConfig:
    """The same settings with `cpu` or `cuda` for `auto`, which is a GPU where one can be used.

    Raises ConfigError: a GPU was asked for and cannot be used, or another setting is not for that device.
    """
    if config.device == "cpu":
        return config
    obstacle = gpu_obstacle()
    if obstacle is None:
        return replace(config, device="cuda")
    if config.device == "cuda":
        raise ConfigError(f"--device cuda: {obstacle}; or use --device cpu")
    if DRIVER.exists():
        _logger.warning("the CPU computes, although there is an NVIDIA driver: %s", obstacle)
    return replace(config, device="cpu")


def gpu_obstacle(driver: Path = DRIVER) -> str | None:
    """Why the first GPU cannot be used, and what to do about it; None: it can."""
    with warnings.catch_warnings():  # what torch warns of is told as the error that follows from it
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return _what_kernels_lack()
    found = _first_line(driver)
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built for CPUs only, and {found or 'there is no NVIDIA driver'}; "
            f"remove .venv and run ./tools/setup.sh, which takes a build for CUDA where it finds a driver"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "no GPU is visible"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
    if found is None:
        return (
            f"there is no NVIDIA driver ({driver} is absent; torch says: {reason}); install one, or give the "
            f"container its GPUs (docker run --gpus all)"
        )
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU ({reason}) with the "
        f"driver {found}; look at nvidia-smi and CUDA_VISIBLE_DEVICES, and update the driver if it is older"
    )


def gpu_machine() -> str:
    """What names the first GPU to a profile of costs: copies are also the work of the machine around it."""
    name, (major, minor) = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    return f"{name}, capability {major}.{minor}, beside {processor()}"


def gpu_kernels() -> str:
    """What computes there, for people and for a profile of costs."""
    triton = importlib.import_module("triton")  # which torch for CUDA brings along
    return f"triton {triton.__version__}, torch {torch.__version__}"


def _what_kernels_lack() -> str | None:
    capability = torch.cuda.get_device_capability(0)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, one)) for one in (LEAST_CAPABILITY, capability))
        return f"{torch.cuda.get_device_name(0)} has compute capability {found}, and kernels need {least}"
    if importlib.util.find_spec("triton") is None:
        return "triton, in which the kernels are written, is not installed; run pip install 'triton>=3.6'"
    compilers = [chosen] if (chosen := chosen_compiler()) else _COMPILERS
    if not any(map(shutil.which, compilers)):
        return f"triton builds what launches its kernels, and finds no C compiler ({', '.join(compilers)})"
    if not (headers := _headers()).exists():
        return f"triton builds what launches its kernels, and {headers} is absent (Debian: python3-dev)"
    return None


def _headers() -> Path:
    """As Triton looks for them: not where Ubuntu's own scheme would have some installed."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_path("include", scheme)) / "Python.h"


def _first_line(driver: Path) -> str | None:
    try:
        line = driver.read_text().partition("\n")[0]
    except OSError:
        return None
    return line.removeprefix("NVRM version: ").strip()
