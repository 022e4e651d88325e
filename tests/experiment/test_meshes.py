"""A run on several devices, in one process or two, against the same run on one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kdq.train.checkpoint import Checkpointer

TOLERANCE = 1e-5
MESHES = {
    "data": {"data": 4},
    "fsdp": {"data": 2, "fsdp": 2},
    "tensor": {"fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def make_config(tiny_config, tmp_path_factory):
    """Writes a config with a mesh to a file: a network distilled, then trained at W4 with a live
    teacher. Gradient descent: Adam divides what is nearly zero by what is nearly zero."""
    folder = tmp_path_factory.mktemp("configs")

    def make(**mesh):
        config = tiny_config()
        config["optimizer"] = {"name": "sgd", "scale_rule": "sgd", "scale_rate": 0.01}
        config["cache"] = {"kind": "none"}
        config["mesh"] = {"least": 16, **mesh}
        config["arms"] = {name: config["arms"][name] for name in ("teacher", "kd", "qad")}
        config["arms"]["qad"] |= {"bits": "W4A8"}
        for arm in config["arms"].values():
            arm["reference"] = ""
        path = folder / f"{'_'.join(map(str, mesh.values()))}.json"
        path.write_text(json.dumps(config))
        return path

    return make


def start(*args):
    script = Path(__file__).with_name("meshed.py")
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def end(*processes, expected=0):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == expected, output


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def results(workdir):
    """`(curves, params)` of the arms."""
    curves, params = {}, {}
    for arm in ("teacher", "kd", "qad"):
        folder = workdir / arm / "0"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        curves[arm] = [json.loads(line) for line in lines]
        with Checkpointer(folder / "checkpoints") as checkpointer:
            state = checkpointer.restore({"state": None})[1]["state"]
        params[arm] = {"params": state["params"], "scales": state["scales"]}
    return curves, params


def assert_same(workdir, reference):
    (curves, params), (own_curves, own_params) = results(reference), results(workdir)
    for arm, lines in curves.items():
        assert len(own_curves[arm]) == len(lines)
        for ours, theirs in zip(own_curves[arm], lines, strict=True):
            assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=TOLERANCE), arm
    for ours, theirs in zip(jax.tree.leaves(own_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def reference(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    end(start(make_config(), workdir, 1))
    return workdir


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("mesh", ["tensor", "data", "fsdp"])
def test_four_devices_are_as_one(mesh, make_config, reference, tmp_path):
    end(start(make_config(**MESHES[mesh]), tmp_path, 4))
    assert_same(tmp_path, reference)
    # It did lie in parts.
    (stored,) = (tmp_path / "qad" / "0" / "checkpoints").glob("8/state/_sharding")
    for axis in {"fsdp", "tensor"} & MESHES[mesh].keys():
        assert f'\\"{axis}\\"' in stored.read_text()


@pytest.mark.slow
def test_two_processes_are_as_one(make_config, reference, tmp_path):
    config, port = make_config(data=2), free_port()
    end(*(start(config, tmp_path, 1, 0, port, 2, i) for i in range(2)))
    assert_same(tmp_path, reference)
    # One of them wrote the record.
    record = json.loads((tmp_path / "qad" / "0" / "result.json").read_text())
    single = json.loads((reference / "qad" / "0" / "result.json").read_text())
    for key in ("arm_digest", "config_digest", "selected_step", "size_bytes"):
        assert record[key] == single[key]
    assert record["metrics"]["test"]["accuracy"] == single["metrics"]["test"]["accuracy"]


@slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_checkpoint_of_four_devices_goes_on_on_fewer(devices, make_config, reference, tmp_path):
    end(start(make_config(data=2, fsdp=2), tmp_path, 4, 7), expected=9)
    with Checkpointer(tmp_path / "qad" / "0" / "checkpoints") as checkpointer:
        assert checkpointer.restore({"state": None})[0] in (3, 6)
    end(start(make_config(fsdp=devices), tmp_path, devices))
    assert_same(tmp_path, reference)


@slow
def test_a_process_that_is_killed_ends_the_other_and_both_go_on(make_config, reference, tmp_path):
    config, port = make_config(data=2), free_port()
    survivor = start(config, tmp_path, 1, 0, port, 2, 0)
    victim = start(config, tmp_path, 1, 7, port, 2, 1)
    end(victim, expected=9)
    output, _ = survivor.communicate(timeout=60)
    assert survivor.returncode not in (0, None), output
    port = free_port()
    end(*(start(config, tmp_path, 1, 0, port, 2, i) for i in range(2)))
    assert_same(tmp_path, reference)
