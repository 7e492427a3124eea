"""What figures from a GPU mean nothing without."""

import platform
import subprocess
from typing import Any

from tools.measure import commit, machine, package_version

PACKAGES = (
    *("numpy", "triton", "grpcio", "protobuf", "uvloop", "pytest", "hypothesis", "transformers"),
    *("tokenizers", "safetensors", "jinja2", "cuda-bindings", "flashinfer-python"),
)


def environment() -> dict[str, Any]:
    """Versions, the GPU if there is one, the machine, the commit with a + if files differ from it."""
    import torch

    found = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: package_version(name) for name in PACKAGES},
        "machine": machine(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    gpu, host = found["gpu"], found["machine"]
    versions = {name: found[name] for name in ("python", "torch", "cuda", *PACKAGES)}
    missing = [name for name, version in versions.items() if version is None]
    of_gpu = "no GPU"
    if gpu:
        size = f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']} GiB"
        of_gpu = f"{gpu['name']}, {size}, driver {gpu['driver']}"
    return [
        of_gpu,
        f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB; {host['system']}",
        "; ".join(f"{name} {version}" for name, version in versions.items() if version is not None),
        f"not here: {', '.join(missing) or 'nothing'}",
        f"commit {found['commit']}",
    ]
