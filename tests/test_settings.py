"""Settings: what each field is the one definition of."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snows_hf.errors import ConfigError
from snows_hf.settings import FinetuneConfig, PruneConfig, Settings, SolverConfig, TrainConfig, check_seed


ROOT = Path(__file__).parents[1]
EVERY = [PruneConfig("2:4"), SolverConfig(), FinetuneConfig(), TrainConfig()]


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests are not beside the documentation")
def test_the_page_is_what_the_script_prints() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/settings.py"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs/settings.md").read_text() == done.stdout


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
def test_every_setting_is_documented(config: Settings) -> None:
    for name, field in type(config).own().items():
        assert field.description, name


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@given(st.data())
def test_whatever_a_setting_is_given_it_takes_or_names(config: Settings, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*config.known(), "colour"]))
    value = data.draw(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()))
    try:
        config.updated(**{name: value})
    except ConfigError as error:
        assert name in error.message


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "much", [], {}])
def test_no_number(config: Settings, value: object) -> None:
    numbers = [name for name, field in config.known().items() if field.annotation in (int, float)]
    assert numbers
    for name in numbers:
        with pytest.raises(ConfigError, match=f"Setting {name} = .*: expected a "):
            config.updated(**{name: value})


def test_a_place_is_named_like_a_name() -> None:
    with pytest.raises(ConfigError, match="Setting k = -1"):
        PruneConfig("2:4", -1)
    with pytest.raises(ConfigError, match="Setting pattern is missing"):
        PruneConfig()
    with pytest.raises(ConfigError, match="Expected SolverConfig"):
        PruneConfig("2:4", solver={"damping": 1.0})


def test_settings_of_the_solver_are_reached() -> None:
    config = PruneConfig("2:4").updated(damping="1e-3", k=7)
    assert (config.solver.damping, config.k, config.solver.beta) == (1e-3, 7, 1e-5)
    with pytest.raises(ConfigError, match=r"Unknown setting 'damp'.*damping"):
        config.updated(damp=1)


@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.0])
def test_seeds_that_no_generator_takes(seed: int) -> None:
    with pytest.raises(ConfigError, match="Setting seed"):
        check_seed(seed)
