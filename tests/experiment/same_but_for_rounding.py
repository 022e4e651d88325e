"""Records of one experiment, run in two ways."""

import functools

import numpy as np

SAME = ("arm", "seed", "arm_digest", "config_digest", "selected_step", "size_bytes", "data")


def check(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.status == theirs.status == "ok"
        for key in SAME:
            assert getattr(ours, key) == getattr(theirs, key)
        assert ours.metrics.keys() == theirs.metrics.keys()
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-3, atol=1e-3, err_msg=ours.arm
        )
        for split, values in theirs.metrics.items():
            close([ours.value(name, split) for name in values], list(values.values()))
        close(ours.value("kl_to_teacher"), theirs.value("kl_to_teacher"))
