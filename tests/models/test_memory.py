"""Loading costs little more memory than the packed weights: the largest model that fits is what counts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.random_model import SHAPES, write_random_model

# 100 MB in bfloat16, three quarters of it in the layers.
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 5, "vocab_size": 16000}

# Run as a process of its own: prints the peak of anonymous memory, in bytes, above what `import torch` took.
# File-backed pages do not count: the system can drop and fetch them at will.
LOADER = """
import json, sys, threading, time
from pathlib import Path
import torch

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

before = peak = anonymous_bytes()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())

done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
from engine.models import load_model
decoder = load_model(Path(sys.argv[1]), getattr(torch, sys.argv[2]), torch.device(sys.argv[3]))
done.set()
watcher.join()
print(json.dumps(max(peak, anonymous_bytes()) - before))
"""


def peak_of_loading(folder: Path, dtype: str, device: str) -> int:
    command = [sys.executable, "-c", LOADER, str(folder), dtype, device]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.parametrize(
    ("shape", "stored", "computed"),
    [
        ("llama-160m", torch.bfloat16, "bfloat16"),
        ("qwen2.5-0.5b", torch.float32, "bfloat16"),
        ("qwen2.5-0.5b", torch.bfloat16, "float32"),
    ],
    ids=["as stored", "narrowed, tied embedding", "widened, tied embedding"],
)
def test_loading_peaks_at_little_more_than_the_packed_weights(
    shape: str, stored: torch.dtype, computed: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = {**SHAPES[shape], **SIZES, "num_attention_heads": 12}
    write_random_model(tmp_path, config, stored)
    peak = peak_of_loading(tmp_path, computed, "cpu")
    packed = packed_bytes(config, getattr(torch, computed))
    assert packed > 90e6
    assert peak <= 1.3 * packed, f"{peak / 1e6:.0f} MB for {packed / 1e6:.0f} MB of packed weights"


def test_what_goes_to_a_device_leaves_no_copy_in_the_hosts_memory(tmp_path: Path) -> None:
    """Converted on its way, as one tensor at a time."""
    config: dict[str, Any] = {**SHAPES["qwen2.5-0.5b"], **SIZES, "num_attention_heads": 12}
    write_random_model(tmp_path, config, torch.float32)
    peak, weights = peak_of_loading(tmp_path, "float16", "meta"), packed_bytes(config, torch.float16)
    assert peak <= 0.6 * weights, f"{peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"


def packed_bytes(config: dict[str, Any], dtype: torch.dtype) -> int:
    """The linears of all layers and the head; the embedding stays in its file."""
    hidden, head_dim = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    attention = 2 * hidden * (hidden + config["num_key_value_heads"] * head_dim)
    layer = attention + 3 * hidden * config["intermediate_size"]
    return dtype.itemsize * (config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)
