"""Names of runs."""

import pytest

from kdq.config import ConfigError
from kdq.sweep import runs

TEMPERATURE = "distill.kd.terms.kl.temperature"


@pytest.mark.parametrize(
    ("overrides", "name", "label", "folder"),
    [
        ({TEMPERATURE: 4.0, "seeds": (3,)}, "", "temperature=4.0", "temperature=4.0,seeds=3"),
        ({"seeds": (0, 1), "evaluations": 2}, "", "evaluations=2", "evaluations=2,seeds=0-1"),
        ({"seeds": (0,)}, "", "base", "base,seeds=0"),
        ({}, "", "base", "base"),
        ({"data.name": "a/../b c"}, "", "name=a-..-b-c", "name=a-..-b-c"),
        ({TEMPERATURE: 4.0, "seeds": (3,)}, "hot", "hot", "hot,seeds=3"),
    ],
)
def test_a_name_says_the_overrides(overrides, name, label, folder):
    assert runs.run_label(overrides, name) == label
    assert runs.run_folder(overrides, name) == folder


@pytest.mark.parametrize("name", ["../x", ".", "a b", "-x", "a/b"])
def test_a_name_that_is_no_folder_is_an_error(name):
    with pytest.raises(ConfigError, match="is a folder: expected letters"):
        runs.run_folder({}, name)


def test_a_name_too_long_for_a_folder_is_an_error():
    with pytest.raises(ConfigError, match='too long: expected a "name"'):
        runs.run_folder({"data.name": "x" * 300})
