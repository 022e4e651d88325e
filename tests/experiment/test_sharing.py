"""Arms that runs have in common: trained once, the same bits as trained in each, whoever dies."""

import copy
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kdq import config, experiment, files
from kdq.experiment import sharing
from kdq.experiment.sharing import Shared
from kdq.experiment.store import Store
from kdq.record import ArmRecord

slow = pytest.mark.slow
SECONDS = ("train_seconds", "calibration_seconds", "compile_seconds")
VARYING = (*SECONDS, "commit", "shared_from", "config_digest")


def with_temperature(tiny_config, temperature, **changed):
    """Three arms, of which the last one's teacher speaks at some temperature."""
    made = copy.deepcopy(tiny_config())
    made["arms"] = {name: made["arms"][name] for name in ("teacher", "student", "kd")}
    made["distill"]["kd"]["terms"]["kl"]["temperature"] = temperature
    return config.freeze({**made, **changed})


def files_of(workdir):
    """The bytes of what arms leave that has no times in it."""
    names = ("model.safetensors", "details.json")
    paths = [path for path in sorted(workdir.glob("*/*/*")) if path.name in names]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def comparable(records):
    return [{k: v for k, v in r.to_json().items() if k not in VARYING} for r in records]


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """`(sweep folder, {run: records})`: two that share arms, and the second one by itself."""
    sweep = tmp_path_factory.mktemp("sweep")
    hot, cold = (with_temperature(tiny_config, t) for t in (2.0, 5.0))
    records = {
        "hot": experiment.run(hot, sweep / "hot", shared=sweep / "shared"),
        "cold": experiment.run(cold, sweep / "cold", shared=sweep / "shared"),
        "alone": experiment.run(cold, sweep / "alone"),
    }
    return sweep, records


@slow
def test_what_an_override_does_not_touch_is_trained_once(runs):
    _, records = runs
    assert all(not r.shared_from for name in ("hot", "alone") for r in records[name])
    assert {r.arm: r.shared_from for r in records["cold"]} == {
        "teacher": "../hot/teacher/0",
        "student": "../hot/student/0",
        "kd": "",
    }
    assert records["cold"][0].train_seconds == records["hot"][0].train_seconds


@slow
def test_a_copy_is_what_training_in_the_run_itself_gives(runs):
    sweep, records = runs
    assert comparable(records["cold"]) == comparable(records["alone"])
    digests = [[r.config_digest for r in records[name]] for name in ("cold", "alone", "hot")]
    assert digests[0] == digests[1] != digests[2]
    assert files_of(sweep / "cold") == files_of(sweep / "alone")  # of what was taught by it, too
    assert len(files_of(sweep / "cold")) == 6
    # A folder of its own: nothing changes if the one that it came from goes.
    inode = lambda run: (sweep / run / "teacher" / "0" / "model.safetensors").stat().st_ino
    assert inode("hot") != inode("cold")


@slow
def test_the_same_run_again_and_one_that_goes_on_find_all_done(runs, tiny_config):
    sweep, records = runs
    before = files_of(sweep / "cold")
    again = experiment.run(
        with_temperature(tiny_config, 5.0), sweep / "cold", shared=sweep / "shared"
    )
    assert again == records["cold"]
    assert files_of(sweep / "cold") == before


class Trained:
    """A run of some experiment in `sweep`, whose arms are trained by writing a line."""

    def __init__(self, made, sweep, name):
        self.store = Store(made, sweep / name)
        self.shared = Shared(sweep / "shared", made, self.store)
        self.times = 0

    def identity(self, arm="teacher", **changed):
        known = {"arm": arm, "seed": 0, "kind": "", "bits": "fp32", "observer": ""}
        known |= {"versions": {"jax": "1"}, "device": "a", "data": {"train": "b"}}
        known |= {"arm_digest": self.store.digests[arm], "config_digest": self.store.workdir.name}
        return ArmRecord(**{**known, **changed})

    def once(self, arm="teacher", weights=b"weights", status="ok", wait=lambda: None, **changed):
        identity = self.identity(arm, **changed)

        def train():
            self.times += 1
            wait()
            folder = self.store.folder(arm, 0)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.safetensors").write_bytes(weights)
            (folder / "caches").mkdir(exist_ok=True)
            record = dataclasses.replace(identity, status=status)
            self.store.save(record)
            return record

        return self.shared.once(identity, train)


@pytest.fixture
def trained(tiny_config, tmp_path):
    def make(name, temperature=2.0, **changed):
        return Trained(with_temperature(tiny_config, temperature, **changed), tmp_path, name)

    return make


def test_two_at_once_train_once(trained):
    first, second = trained("first"), trained("second", 5.0)
    begun, release, records = threading.Event(), threading.Event(), []
    wait = lambda: (begun.set(), release.wait(30))
    threads = [threading.Thread(target=lambda: first.once(wait=wait))]
    threads[0].start()
    assert begun.wait(30)
    threads.append(threading.Thread(target=lambda: records.append(second.once())))
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()  # it waits
    release.set()
    for thread in threads:
        thread.join(30)
    assert (first.times, second.times) == (1, 0)
    assert records[0].shared_from == "../first/teacher/0"
    assert records[0].config_digest == "second"
    assert records[0].exports == {}
    copied = second.store.folder("teacher", 0)
    assert {path.name for path in copied.iterdir()} == {"model.safetensors", "result.json"}
    assert files.read_json(copied / "result.json") == records[0].to_json()


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "other"},
        {"versions": {"jax": "2"}},
        {"data": {"train": "other"}},
        {"seed": 1},
    ],
)
def test_what_decides_the_bits_must_be_equal(trained, changed):
    trained("first").once()
    other = trained("second")
    assert other.once(**changed).shared_from == ""
    assert other.times == 1


@pytest.mark.parametrize("changed", [{"evaluations": 4}, {"mesh": {"data": 1, "least": 9}}])
def test_another_config_is_trained_again(trained, changed):
    trained("first").once()
    other = trained("second", **changed)
    assert other.once().shared_from == ""


def test_an_arm_is_not_taken_over_whose_ancestors_are_other_bits(trained):
    first, same, other = trained("first"), trained("same"), trained("other")
    first.once()
    first.once("kd")
    same.once()
    assert same.once("kd").shared_from == "../first/kd/0"
    # A teacher that was trained elsewhere, on a device that does not repeat its sums.
    other.once(weights=b"nearly", device="elsewhere")
    assert other.once("kd").shared_from == ""
    assert (same.times, other.times) == (0, 2)


def test_a_failed_or_deleted_arm_is_trained_again(trained):
    first, second, third = trained("first"), trained("second"), trained("third")
    first.once(status="failed")
    assert second.once().shared_from == ""
    for path in second.store.folder("teacher", 0).iterdir():
        path.rename(path.with_name(f"gone_{path.name}"))
    assert third.once().shared_from == ""
    assert trained("fourth").once().shared_from == "../third/teacher/0"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"folder": 3}', '{"folder": "../none"}', "{"])
def test_where_a_trained_arm_is_may_be_damaged(trained, text):
    first, second = trained("first"), trained("second")
    first.once()
    first.shared._path(first.identity(), "json").write_text(text)
    assert second.once().shared_from == ""
    first.store.folder("teacher", 0).joinpath("result.json").write_text("[1]")
    assert trained("third").once().shared_from == "../second/teacher/0"


def test_a_copy_that_was_cut_off_is_made_again(trained, monkeypatch):
    first, second = trained("first"), trained("second")
    first.once()
    folder = second.store.folder("teacher", 0)
    (folder / "checkpoints").mkdir(parents=True)  # of a run that was killed
    (folder / "checkpoints" / "half").write_text("half")

    def killed(record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(second.store, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            second.once()
    assert second.store.finished("teacher", 0) is None
    assert second.once().shared_from == "../first/teacher/0"
    assert not (folder / "checkpoints").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["0"]


def test_whoever_is_killed_lets_go(trained, tmp_path):
    first = trained("first")
    path = first.shared._path(first.identity(), "lock")
    path.parent.mkdir()
    held = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", held, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        waiting = threading.Thread(target=first.once)
        waiting.start()
        waiting.join(0.3)
        assert first.times == 0
        process.send_signal(signal.SIGKILL)
        waiting.join(30)
    assert first.times == 1


def test_a_disk_without_locks_keeps_nobody_from_training(trained, monkeypatch, caplog):
    def refuse(file, flags):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(sharing.fcntl, "flock", refuse)
    assert trained("first").once().shared_from == ""
    assert trained("second").once().shared_from == "../first/teacher/0"
    assert "can't be locked: No locks available" in caplog.text


def test_searched_bits_and_seeds_at_once_are_not_shared(tiny_config, tmp_path):
    made = with_temperature(tiny_config, 2.0, seeds=(0, 1), seeds_at_once=2)
    assert not Shared(tmp_path, made, Store(made, Path(tmp_path))).covers("teacher")
    plain = config.to_json(with_temperature(tiny_config, 2.0))
    search = config.search(students=("student",), teacher="teacher", most={"average_bits": 3.0})
    plain["searches"] = {"found": search}
    plain["arms"]["ptq"] = config.arm(model="student", init="student", bits="found")
    plain["arms"]["qad"] = config.arm(
        model="student", init="ptq", bits="W4", epochs=1.0, teacher="teacher", distill="kd"
    )
    made = config.freeze(plain)
    shared = Shared(tmp_path, made, Store(made, Path(tmp_path)))
    covered = {name: shared.covers(name) for name in made.arms}
    assert covered == {"teacher": True, "student": True, "kd": True, "ptq": False, "qad": False}
