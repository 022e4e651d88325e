"""Float arms and one search with its two arms, on digits, for the tests of searches."""

import shutil

import pytest
from searches import TAUGHT, Watcher, searched

from kdq import config, experiment


@pytest.fixture(scope="session")
def make_config(tiny_config):
    """Makes the config of an experiment with these searches, each with two arms."""

    def make(searches=None, *, qad=True, **changes):
        fields = tiny_config() | {"ptq": {}, "qat": {}}
        fields["quantize"] = {"calibration_examples": 128}
        fields["models"]["narrow"] = {"name": "cnn", "num_classes": 10, "widths": (3, 4)}
        fields["arms"] = {
            "teacher": fields["arms"]["teacher"],
            "wide": {"model": "student", "epochs": 1.0, "learning_rate": 1e-2},
            "narrow": {"model": "narrow", "epochs": 1.0, "learning_rate": 1e-2},
        }
        for name, search in (searches or {}).items():
            own = {"model": "student", "init": "wide", "bits": name}
            if search["students"][0] == "narrow":
                own |= {"model": "narrow", "init": "narrow"}
            fields["arms"][f"{name}_ptq"] = own
            if qad:
                fields["arms"][f"{name}_qad"] = {**own, "epochs": 0.3, **TAUGHT}
        return {**fields, "searches": dict(searches or {}), **changes}

    return make


@pytest.fixture(scope="session")
def floats(make_config, tmp_path_factory):
    """A folder in which all float arms have been run."""
    workdir = tmp_path_factory.mktemp("floats")
    experiment.run(config.freeze(make_config()), workdir)
    return workdir


@pytest.fixture(scope="session")
def finished_search(make_config, floats, tmp_path_factory):
    """`(its config, folder, records by arm, who watched)` of one search and its two arms."""
    workdir = tmp_path_factory.mktemp("found") / "run"
    shutil.copytree(floats, workdir)
    frozen, watcher = config.freeze(make_config({"four": searched()})), Watcher()
    records = experiment.run(frozen, workdir, progress=watcher)
    return frozen, workdir, {r.arm: r for r in records}, watcher


@pytest.fixture
def folder(floats, finished_search, tmp_path):
    """Float arms and cost tables, and no search."""
    workdir = tmp_path / "run"
    shutil.copytree(floats, workdir)
    shutil.copytree(finished_search[1] / "costs", workdir / "costs")
    return workdir
