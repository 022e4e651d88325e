"""Records of one experiment, run in two ways."""

import numpy as np

SAME = ("arm", "seed", "arm_digest", "config_digest", "selected_step", "size_bytes", "data")
CLOSE = ("accuracy", "nll", "accuracy_last", "nll_last", "kl_to_teacher", "validation_nll")


def check(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.status == theirs.status == "ok"
        for key in SAME:
            assert getattr(ours, key) == getattr(theirs, key)
        own, others = ([getattr(record, key) for key in CLOSE] for record in (ours, theirs))
        np.testing.assert_allclose(own, others, rtol=1e-3, atol=1e-3, err_msg=ours.arm)
