"""The records of every kind of arm are those that are committed, within what processors differ by.

    PYTHONPATH=tests python tests/golden/test_record.py WORKDIR

writes those of a finished run of every_arm.py to record.json: only for a change that is meant.
"""

import json
import runpy
import sys
from pathlib import Path

import compare
import numpy as np
import pytest

from kdq import config, experiment

HERE = Path(__file__).parent
# Digests of floats differ between processors.
VARYING = (*compare.VARYING, "sha256", "device")
# Two levels of XLA's optimization differ by 2e-6. A difference in the method is far above this.
TOLERANCE = {"rtol": 0.02, "atol": 0.02}


def measurements(workdir):
    """Returns `{arm: its record}`, of one seed, without what varies."""
    paths = sorted(Path(workdir).glob("*/0/result.json"))
    read = lambda path: compare.lasting(json.loads(path.read_text()), VARYING)
    records = {path.parts[-3]: read(path) for path in paths}
    for record in records.values():
        # StableHLO says of each operation which lines of Python it is from: its size varies.
        record.get("exports", {}).get("stablehlo", {}).pop("size_bytes", None)
    return records


def check(actual, expected, where):
    assert type(actual) is type(expected), f"{where}: {actual!r} for {expected!r}"
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            check(actual[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            check(actual[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        np.testing.assert_allclose(actual, expected, err_msg=where, **TOLERANCE)
    else:
        assert actual == expected, f"{where}: {actual!r} for {expected!r}"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("golden") / "run"
    every_arm = runpy.run_path(str(HERE / "every_arm.py"))["get_config"]()
    every_arm.workers = 1
    experiment.run(config.freeze(every_arm), workdir)
    return measurements(workdir)


def test_records_are_those_that_are_committed(records):
    expected = json.loads((HERE / "record.json").read_text())
    assert records.keys() == expected.keys()
    for arm, record in expected.items():
        check(records[arm], record, arm)


def test_another_number_or_field_is_noticed(records):
    name = "qad"
    test = records[name]["metrics"]["test"]
    other = {"metrics": {**records[name]["metrics"], "test": {**test, "nll": test["nll"] * 1.05}}}
    for change in (other, {"steps": 1}, {"new": None}):
        with pytest.raises(AssertionError):
            check({**records[name], **change}, records[name], name)


if __name__ == "__main__":
    text = json.dumps(measurements(sys.argv[1]))
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))
    text = json.dumps(rounded, indent=0, separators=(",", ":"))
    (HERE / "record.json").write_text(text + "\n")
