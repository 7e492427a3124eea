"""`continuo profile` as a user meets it, and `continuo serve` that finds what it wrote."""

import json
from dataclasses import replace

import pytest

from engine.cache.costs import MeasuredCosts
from engine.cost_profile import Profile, Subject
from tools.profile import conclusion, quietness, report

SUBJECT = Subject("0123456789abcdef", "cpu", "bfloat16", 2, 32, "Some CPU", "native AVX2", "1.0")


def profile(load_s: float, spread: float = 0.04) -> Profile:
    costs = MeasuredCosts({128: 0.010, 256: 0.020}, {1: 0.001, 16: load_s}, {1: 0.002, 16: 0.003}, spread)
    return Profile(SUBJECT, 1_800_000_000, 0.25, costs)


def test_a_profile_is_shown_as_a_table_and_what_follows_from_it() -> None:
    assert report(profile(load_s=0.004)) == [
        "blocks of 32 tokens | bfloat16 | 2 threads of Some CPU | native AVX2",
        " up to token  compute ms  reload ms    ratio",
        "         128      10.000      4.000      2.5",
        "         256      20.000      4.000      5.0",
        "      blocks    store ms  reload ms  (each, so many at once)",
        "           1       2.000      1.000",
        "          16       3.000      4.000",
        "a block is reloaded rather than computed again wherever it stands",
        "the machine was quiet: repeats differ by 4%, load average 0.25 before",
    ]


def test_a_profile_of_a_gpu_tells_of_no_threads() -> None:
    on_gpu = replace(SUBJECT, device="cuda", machine="A GPU, beside Some CPU", kernels="triton 3")
    title = report(replace(profile(load_s=0.004), subject=on_gpu))[0]
    assert title == "blocks of 32 tokens | bfloat16 | A GPU, beside Some CPU | triton 3"


@pytest.mark.parametrize(
    ("load_s", "said"),
    [
        (0.0101, "a block is reloaded rather than computed again from token 128 on"),  # it ends at 160
        (0.020, "a block is reloaded rather than computed again from token 224 on"),
        (0.021, "a block is computed again rather than reloaded, up to token 256 at least"),
    ],
)
def test_from_where_on_the_host_tier_pays_is_said(load_s: float, said: str) -> None:
    assert conclusion(profile(load_s)) == said


def test_figures_of_a_busy_machine_are_told_from_others() -> None:
    assert quietness(profile(0.1, spread=0.3)).startswith("the machine was busy: repeats differ by 30%")


def test_what_profile_wrote_serve_finds_and_says_how_old_it_is(continuo, serve, talking_model, tmp_path):
    ended = continuo("profile", talking_model, "--device-kv-tokens", 600)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines() == [f"measuring at token {end}" for end in (128, 256, 512)]
    (path,) = (tmp_path / "cache" / "continuo" / "profiles").iterdir()
    assert ended.stdout.splitlines()[-1] == f"written to {path}"
    assert list(json.loads(path.read_text())["costs"]["compute_s"]) == ["128", "256", "512"]

    server = serve(talking_model, "--host-kv-tokens", 640)
    assert server.stderr.splitlines()[1].endswith(" | costs profiled today")
    path.write_text("{")
    warning, *banner = serve(talking_model, "--data-dir", "none").stderr.splitlines()
    assert f"warning: the profile {path} is of no use: it is damaged; measure again with" in warning
    assert banner[1].endswith(" | costs measured quickly at start")


def test_a_profile_goes_where_it_is_sent_and_one_that_is_asked_for_must_fit(
    continuo, talking_model, tmp_path
):
    path = tmp_path / "mine" / "costs.json"
    ended = continuo("profile", talking_model, "--device-kv-tokens", 200, "--output", path)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "cache").exists()
    ended = continuo("serve", talking_model, "--block-size", 16, "--profile", path, "--data-dir", "none")
    assert ended.returncode == 2
    assert f"error: the profile {path} is of block size 32, and this is 16; measure" in ended.stderr


def test_a_place_that_cannot_be_written_is_an_error_after_the_figures(continuo, talking_model, tmp_path):
    ended = continuo("profile", talking_model, "--device-kv-tokens", 200, "--output", tmp_path)
    assert ended.returncode == 2
    assert "compute ms" in ended.stdout
    assert ended.stderr.splitlines()[-1].startswith(f"error: the profile cannot be written to {tmp_path}: ")
