"""What a launch would compile on a GPU, told without one."""

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.gpu.launch import Launch


def specialised(launch: Launch, *args: Any) -> dict[str, tuple[str, str | None]]:
    """What a kernel is specialised on, argument by argument: the type, and "D" where the code will rely on a
    multiple of 16.
    """
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, found, _ = bind(*args, **launch.constants)
    told = dict(zip(bound, found, strict=True))
    return {name: told[name] for name in bound if name not in launch.constants}


def compiled_for(launch: Launch) -> dict[str, tuple[str, str | None]]:
    """The same of what is compiled ahead of time."""
    relied_upon = {
        parameter.name: "" if parameter.do_not_specialize_on_alignment else "D"
        for parameter in launch.kernel.params
    }
    return {
        name: (kind, relied_upon[name] if kind.startswith("*") else None)
        for name, kind in launch.signature.items()
    }
