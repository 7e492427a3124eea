"""An engine as its settings ask for it, over a tiny random model."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine import loader, parts
from engine.async_engine import AsyncEngine
from engine.cache.costs import CostTable
from engine.cache.policy import policy_named
from engine.config import EngineConfig
from engine.cost_profile import Profile, write_profile
from engine.errors import ConfigError, ModelFolderError
from engine.loader import load_engine, profile_model
from engine.memory import Room
from engine.profile import Profiler
from tools.random_model import write_random_model

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("models") / "3f2a"
    write_random_model(folder, TINY)
    return EngineConfig(folder, dtype="float32", device_kv_tokens=256)


@pytest.mark.parametrize(("name", "shown"), [(None, "3f2a"), ("org/tiny", "org/tiny")])
async def test_a_model_goes_by_its_name_or_else_its_folders(
    config: EngineConfig, name: str | None, shown: str
) -> None:
    async with load_engine(replace(config, name=name)) as engine:
        assert engine.model_info().name == shown
        assert f" | {shown} (Llama, 2 layers, context 224)" in engine.description[0]


def test_a_cache_that_cannot_be_is_refused_with_what_would_fit(config: EngineConfig) -> None:
    for tokens, complaint in (
        (63, r"the KV cache would hold 63 tokens; give it at least 64 \(two blocks\)"),
        (1 << 40, r"takes .* GiB and .* GiB are left by .*; --device-kv-tokens \d+ would fit"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load_engine(replace(config, device_kv_tokens=tokens))


async def test_a_host_tier_that_does_not_fit_is_made_smaller_with_a_warning(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parts, "available", lambda: Room(1 << 20, "the control group /pod"))
    async with load_engine(replace(config, host_kv_tokens=1 << 20)) as engine:
        load = engine.load()
        assert engine.description[2].endswith("(less than asked for)")
    (warning,) = caplog.messages
    fitting = int(((1 << 20) - 256 * 256) * 0.9) // 256 // 32 * 32  # 256 bytes per token
    assert load.host.total_tokens == fitting
    assert "a host KV cache of 1,048,576 tokens takes 256.0 MiB" in warning
    assert f"left by the control group /pod beside the device tier: it holds {fitting:,} tokens" in warning


def test_an_engine_that_was_refused_lets_go_of_its_data_dir(config: EngineConfig, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError):
            load_engine(replace(config, device_kv_tokens=63, data_dir=tmp_path / "state"))


def test_a_folder_that_is_no_model_says_what_it_lacks(config: EngineConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="has no config.json"):
        load_engine(replace(config, model=tmp_path))


# -- costs


@pytest.fixture(scope="module")
def profile(config: EngineConfig) -> Profile:
    return profile_model(config, lambda end: None)


def costs_told(engine: AsyncEngine) -> str:
    return engine.description[1].rpartition(" | ")[2]


async def test_without_a_profile_costs_are_measured_within_a_second_or_so(config: EngineConfig) -> None:
    begun = time.perf_counter()
    async with load_engine(replace(config, host_kv_tokens=256)) as engine:
        assert time.perf_counter() - begun < 5.0
        assert costs_told(engine) == "costs measured quickly at start"


async def test_a_profile_is_found_used_and_told_with_its_age(
    config: EngineConfig, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(profile, measured_at=profile.measured_at - 3 * 86400)
    write_profile(old, tmp_path / profile.subject.file_name)
    monkeypatch.setattr(Profiler, "measure", None)  # nothing is measured
    used: list[CostTable] = []
    monkeypatch.setattr(
        loader, "policy_named", lambda name, costs: used.append(costs) or policy_named(name, costs)
    )
    for settings in ({"profile_dir": tmp_path}, {"profile": tmp_path / profile.subject.file_name}):
        async with load_engine(replace(config, host_kv_tokens=256, **settings)) as engine:  # type: ignore[arg-type]
            assert costs_told(engine) == "costs profiled 3 days ago"
        for end, seconds in profile.costs.compute_s.items():
            assert used[-1].compute_s(end) >= seconds > 0
        assert used[-1].load_s == profile.costs.load_s[max(profile.costs.load_s)]


async def test_a_profile_that_was_found_and_is_damaged_is_named_and_not_used(
    config: EngineConfig, profile: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / profile.subject.file_name
    write_profile(profile, path)
    path.write_bytes(path.read_bytes()[:100])
    async with load_engine(replace(config, profile_dir=tmp_path)) as engine:
        assert costs_told(engine) == "costs measured quickly at start"
    (warning,) = caplog.messages
    assert warning == (
        f"the profile {path} is of no use: it is damaged; measure again with `continuo profile`; "
        "until then costs are measured quickly at each start"
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"threads": 77}, "is of threads 77, and this is "),
        ({"model": "fedcba9876543210"}, "is of model fedcba9876543210, and this is "),
        (None, "is of no use: it is damaged"),
    ],
)
def test_a_profile_that_was_asked_for_and_does_not_hold_here_is_refused(
    config: EngineConfig, profile: Profile, tmp_path: Path, changes: dict[str, object] | None, complaint: str
) -> None:
    path = tmp_path / "mine.json"
    write_profile(replace(profile, subject=replace(profile.subject, **(changes or {}))), path)  # type: ignore[arg-type]
    if changes is None:
        path.write_text("?")
    with pytest.raises(ConfigError, match=f"the profile {path} {complaint}"):
        load_engine(replace(config, profile=path))


def test_a_profile_that_is_not_there_is_refused_if_it_was_asked_for(
    config: EngineConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="none.json cannot be read: No such file or directory"):
        load_engine(replace(config, profile=tmp_path / "none.json"))


async def test_copies_with_checksums_are_measured_not_looked_up(
    config: EngineConfig, profile: Profile, tmp_path: Path
) -> None:
    write_profile(profile, tmp_path / profile.subject.file_name)
    verified = replace(config, profile_dir=tmp_path, host_kv_tokens=256, verify_reloads=True)
    async with load_engine(verified) as engine:
        assert costs_told(engine) == "costs measured quickly at start"
    with pytest.raises(ConfigError, match="leave out --profile or --verify-reloads"):
        replace(verified, profile=tmp_path / "mine.json")


async def test_where_nothing_depends_on_costs_none_are_measured(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Profiler, "measure", None)
    async with load_engine(replace(config, policy="lru")) as engine:
        assert "costs" not in engine.description[1]
