"""`continuo profile`: what a block of KV costs on this machine, measured with patience."""

import sys
from argparse import Namespace

from engine import EngineConfig
from engine.cache.costs import reload_is_cheaper
from engine.cost_profile import Profile, write_profile
from engine.errors import ConfigError, EngineError
from engine.loader import profile_model
from tools.hub import HubError, resolve_model

EXPECTED: tuple[type[Exception], ...] = (EngineError, HubError)
USAGE: tuple[type[Exception], ...] = (ConfigError,)
QUIET_SPREAD = 0.1  # of repeats, on an idle machine


def run(chosen: Namespace) -> int:
    config = EngineConfig(
        model=resolve_model(chosen.model, chosen.revision, chosen.offline),
        device=chosen.device,
        dtype=chosen.dtype,
        block_size=chosen.block_size,
        device_kv_tokens=chosen.device_kv_tokens,
        device_kv_bytes=chosen.device_kv_memory,
        threads=chosen.threads,
    )
    profile = profile_model(config, lambda end: print(f"measuring at token {end:,}", file=sys.stderr))
    for line in report(profile):
        print(line)
    path = chosen.output or chosen.profile_dir / profile.subject.file_name
    write_profile(profile, path)
    print(f"written to {path}")
    return 0


def report(profile: Profile) -> list[str]:
    """For people."""
    subject, costs, table = profile.subject, profile.costs, profile.costs.table()
    threads = f"{subject.threads} thread{'s' * (subject.threads > 1)} of " if subject.device == "cpu" else ""
    lines = [
        f"blocks of {subject.block_size} tokens | {subject.dtype} | {threads}{subject.machine} | "
        f"{subject.kernels}",
        f"{'up to token':>12}  {'compute ms':>10}  {'reload ms':>9}  {'ratio':>7}",
    ]
    for end, seconds in costs.compute_s.items():
        ratio = seconds / table.load_s
        lines.append(f"{end:>12,}  {seconds * 1e3:>10.3f}  {table.load_s * 1e3:>9.3f}  {ratio:>7.1f}")
    lines.append(f"{'blocks':>12}  {'store ms':>10}  {'reload ms':>9}  (each, so many at once)")
    for num, seconds in costs.load_s.items():
        lines.append(f"{num:>12}  {costs.store_s[num] * 1e3:>10.3f}  {seconds * 1e3:>9.3f}")
    return [*lines, conclusion(profile), quietness(profile)]


def conclusion(profile: Profile) -> str:
    """From where on the host tier pays."""
    table, size = profile.costs.table(), profile.subject.block_size
    longest = max(profile.costs.compute_s)
    first = next((end for end in range(size, longest + 1, size) if reload_is_cheaper(table, end, 1.0)), None)
    if first is None:
        return f"a block is computed again rather than reloaded, up to token {longest:,} at least"
    if first == size:
        return "a block is reloaded rather than computed again wherever it stands"
    return f"a block is reloaded rather than computed again from token {first - size:,} on"


def quietness(profile: Profile) -> str:
    spread = f"repeats differ by {profile.costs.spread:.0%}, load average {profile.load_average:.2f} before"
    if profile.costs.spread <= QUIET_SPREAD:
        return f"the machine was quiet: {spread}"
    return f"the machine was busy: {spread}; measure again when it is idle"
