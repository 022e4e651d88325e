"""Seeds as one program: the same records, in fewer steps of the device."""

import numpy as np
import pytest
import same_but_for_rounding
from compilations import count_compilations
from safetensors.numpy import load_file

from kdq import config, experiment, files
from kdq.config import ConfigError


@pytest.fixture(scope="module")
def make(tiny_config):
    def with_seeds(at_once, seeds=(0, 1, 2)):
        changed = tiny_config()
        changed["seeds"], changed["seeds_at_once"] = seeds, at_once
        # Not Adam, whose first steps are of one size however small the gradient: rounding tells.
        changed["optimizer"] = {"name": "sgd", "scale_rule": "sgd"}
        return config.freeze(changed)

    return with_seeds


class Groups(experiment.Progress):
    def __init__(self):
        self.trained, self.done_ = [], []

    def arm(self, name, seeds, steps):
        if steps:
            self.trained.append((name, tuple(seeds)))

    def done(self, record):
        self.done_.append((record.arm, record.seed))


@pytest.mark.slow
def test_records_are_those_of_one_seed_at_a_time(make, tmp_path):
    single = experiment.run(make(1), tmp_path / "single")
    groups = Groups()
    with count_compilations("_steps") as compiled:
        both = experiment.run(make(2), tmp_path / "both", progress=groups)
    trained = ["teacher", "student", "kd", "qat", "qad"]
    assert groups.trained == [(arm, seeds) for seeds in ((0, 1), (2,)) for arm in trained]
    assert sorted(groups.done_) == sorted((r.arm, r.seed) for r in both)
    # Teacher and student, labels and distilled, float and quantized; batch norm that is frozen.
    assert 0 < len(compiled) <= 6
    same_but_for_rounding.check(both, single)
    paths = [tmp_path / run / "teacher" / "1" / "model.safetensors" for run in ("single", "both")]
    first, second = map(load_file, paths)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-5)


@pytest.mark.slow
def test_a_seed_that_is_done_stays_as_it_is(make, tmp_path):
    experiment.run(make(1, seeds=(1,)), tmp_path)
    path = tmp_path / "kd" / "1" / "result.json"
    before, groups = path.read_bytes(), Groups()
    records = experiment.run(make(3), tmp_path, arms=["kd"], progress=groups)
    assert groups.trained == [("teacher", (0, 2)), ("kd", (0, 2))]
    assert path.read_bytes() == before
    assert files.read_json(path) in [record.to_json() for record in records]


@pytest.mark.parametrize("at_once", [0, -1])
def test_too_few_at_once(make, tmp_path, at_once):
    with pytest.raises(ConfigError, match=rf"seeds_at_once={at_once}: expected at least 1"):
        experiment.run(make(at_once), tmp_path)
