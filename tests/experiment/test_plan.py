"""The order of arms, and the digests that say whether a finished one is still valid."""

import copy

from kdq import config
from kdq.experiment import plan


def frozen(base, **changes):
    """`base` with nested values replaced: keys are paths joined by "__"."""
    changed = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = changed
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return config.freeze(changed)


def test_order(tiny_experiment):
    assert config.ancestors(tiny_experiment, "qad") == ("teacher", "kd", "qad")
    assert config.ancestors(tiny_experiment, "ptq", "student") == ("student", "ptq")
    everything = config.ancestors(tiny_experiment, *tiny_experiment.arms)
    assert everything == ("teacher", "student", "kd", "ptq", "qat", "qad")


def changed_arms(base, **changes):
    before = plan.digests(frozen(base))
    after = plan.digests(frozen(base, **changes))
    return {name for name in before if before[name] != after[name]}


def test_a_digest_covers_what_decides_the_numbers_and_nothing_else(tiny_config):
    base = tiny_config()
    every = set(base["arms"])
    assert changed_arms(base) == set()
    assert changed_arms(base, arms__qat__learning_rate=0.5) == {"qat"}
    assert changed_arms(base, arms__student__epochs=2.0) == {"student", "ptq", "qat"}
    assert changed_arms(base, distill__kd__task=0.5) == {"kd", "qad"}
    assert changed_arms(base, arms__teacher__epochs=2.0) == every  # fidelity is against it
    assert changed_arms(base, models__student__widths=(4, 7)) == every - {"teacher"}
    assert changed_arms(base, quantize__keep_bits=4) == {"ptq", "qat", "qad"}
    assert changed_arms(base, data__batch_size=32) == every
    assert changed_arms(base, optimizer__name="sgd") == every
    assert changed_arms(base, evaluations=5) == every
    # What only says where, how often to save, or what to compare with.
    assert changed_arms(base, seeds=(5,)) == set()
    assert changed_arms(base, data__data_dir="/elsewhere") == set()
    assert changed_arms(base, checkpoint_seconds=9.0) == set()
    assert changed_arms(base, quick=True) == set()
    assert changed_arms(base, arms__qad__reference="qat") == set()


def test_the_experiment_digest_leaves_out_seeds_and_folder(tiny_config):
    base = tiny_config()
    digest = plan.experiment_digest(frozen(base))
    same = frozen(base, seeds=(4, 5), data__data_dir="/x", resources={"cpus": 2}, quick=True)
    assert digest == plan.experiment_digest(same)
    assert digest != plan.experiment_digest(frozen(base, arms__qat__epochs=3.0))
