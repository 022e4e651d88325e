"""What a finished arm hands on is what its record is about, or nothing."""

import dataclasses
import hashlib
import json
import re
import shutil
import threading

import numpy as np
import pytest

from kdq import config, experiment, files, lock
from kdq.config import ConfigError
from kdq.deploy import load_packed
from kdq.distill.cache_key import digest_variables
from kdq.experiment.store import Store
from kdq.train.checkpoint import Checkpointer, CheckpointError


@pytest.fixture(scope="module", autouse=True)
def newest_is_best():
    """So that older checkpoints have selected older weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdq.train.loop.improves", lambda task, metrics, than: True)
        yield


@pytest.fixture(scope="module")
def finished(newest_is_best, tiny_config, tmp_path_factory):
    """A teacher, a student, and what begins with the student."""
    base = tiny_config()
    base["arms"] = {name: base["arms"][name] for name in ("teacher", "student", "ptq")}
    frozen, workdir = config.freeze(base), tmp_path_factory.mktemp("finished")
    records = experiment.run(frozen, workdir)
    return frozen, workdir, {record.arm: record for record in records}


@pytest.fixture
def copied(finished, tmp_path):
    """A copy in which the student is finished, and what begins with it is not."""
    shutil.copytree(finished[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ptq")
    return tmp_path / "run"


def result(workdir, arm="student"):
    return workdir / arm / "0" / "result.json"


def checkpoints(workdir):
    folder = workdir / "student" / "0" / "checkpoints"
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def flip_weights(checkpoint):
    """A bit in the largest file of the selected weights."""
    chunks = (checkpoint / "selected").rglob("d/*")
    path = max(chunks, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def cut_record(checkpoint):
    path = checkpoint / "record" / "metadata"
    path.write_text(path.read_text()[:20])


def packed_bytes(workdir, arm="ptq"):
    return (workdir / arm / "0" / "model.safetensors").read_bytes()


def test_a_record_names_its_weights_and_its_file(finished):
    _, workdir, records = finished
    packed = load_packed(workdir / "student" / "0" / "model.safetensors")
    assert records["student"].weights_sha256 == digest_variables(packed.variables)
    assert records["ptq"].weights_sha256 == ""  # which has none to hand on
    for arm, record in records.items():
        with open(workdir / arm / "0" / "model.safetensors", "rb") as file:
            assert record.packed_sha256 == hashlib.file_digest(file, "sha256").hexdigest()
        assert files.read_json(result(workdir, arm)) == record.to_json()


@pytest.mark.parametrize("damage", [flip_weights, cut_record])
def test_older_weights_are_not_handed_on(finished, copied, damage, caplog):
    frozen, _, records = finished
    older, newest = checkpoints(copied)
    assert records["student"].selected_step == int(newest.name)  # and older weights are others
    damage(newest)
    with pytest.raises(CheckpointError) as raised:
        experiment.run(frozen, copied)
    folder = copied / "student" / "0"
    assert str(raised.value) == (
        f"{folder}/checkpoints has no checkpoint with the weights that {folder}/result.json is "
        f"about: delete {folder} to train the arm again"
    )
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert older.is_dir()
    assert not result(copied, "ptq").exists()
    shutil.rmtree(folder)  # as it says
    assert [r.status for r in experiment.run(frozen, copied)] == ["ok"] * 3
    assert packed_bytes(copied) == packed_bytes(finished[1])


@pytest.mark.parametrize("damage", [flip_weights, cut_record])
def test_an_older_checkpoint_with_the_same_weights_will_do(finished, copied, damage, caplog):
    older, newest = checkpoints(copied)
    shutil.rmtree(older)
    shutil.copytree(newest, older)
    damage(newest)
    experiment.run(finished[0], copied)
    assert packed_bytes(copied) == packed_bytes(finished[1])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_record_from_before_there_were_digests_goes_by_the_step(
    finished, copied, damaged, caplog
):
    newest = checkpoints(copied)[-1]
    shutil.rmtree(newest / "digests")
    record = files.read_json(result(copied))
    del record["weights_sha256"], record["packed_sha256"]
    result(copied).write_text(json.dumps(record))
    if damaged:
        cut_record(newest)
        with pytest.raises(CheckpointError, match="has no checkpoint with the weights that"):
            experiment.run(finished[0], copied)
    else:
        experiment.run(finished[0], copied)
        assert packed_bytes(copied) == packed_bytes(finished[1])


def test_other_weights_in_a_sound_checkpoint_are_not_handed_on(finished, copied, caplog):
    """Those of another run, digests and all."""
    older, newest = checkpoints(copied)
    for path in (older, newest):
        shutil.rmtree(path)
    with Checkpointer(finished[1] / "student" / "0" / "checkpoints") as checkpointer:
        step, trees, kept = checkpointer.restore({"selected": None})
    kernel = trees["selected"]["params"]["head"]["kernel"]
    trees["selected"]["params"]["head"]["kernel"] = np.asarray(kernel) * 2
    with Checkpointer(newest.parent) as checkpointer:
        checkpointer.save(step, trees, kept)
    with pytest.raises(CheckpointError, match="has no checkpoint with the weights that"):
        experiment.run(finished[0], copied)


def test_a_flipped_bit_of_a_record_is_no_number_of_the_table(finished, copied):
    frozen, path = finished[0], result(copied)
    data, expected = path.read_bytes(), files.read_json(path)
    store = Store(frozen, copied)
    noticed = 0
    for bit in np.random.default_rng(0).integers(8 * len(data), size=200):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << int(bit) % 8
        path.write_bytes(flipped)
        try:
            record = store.finished("student", 0)
        except ConfigError as error:
            noticed += str(error).startswith(str(path)) and "delete it" in str(error)
        else:
            noticed += record.to_json() == expected
    assert noticed == 200
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        experiment.run(frozen, copied)


def test_a_record_that_is_deleted_as_told_is_made_again(finished, copied):
    path = result(copied)
    path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": 0.9', 1))
    with pytest.raises(ConfigError, match=r"its contents are not those of its seal .*delete it"):
        experiment.run(finished[0], copied)
    path.unlink()
    again = {record.arm: record for record in experiment.run(finished[0], copied)}
    expected = finished[2]["student"]
    times = dict.fromkeys(("train_seconds", "commit"))
    assert dataclasses.replace(again["student"], **times) == dataclasses.replace(expected, **times)


def on_test(**values):
    return {"metrics": {"test": values}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "teacher"}, "it is of arm 'teacher', seed 0"),
        ({"seed": 7}, "it is of arm 'student', seed 7"),
        ({"status": 5}, "status=5: expected text"),
        ({"status": None}, "status is missing"),
        (on_test(accuracy=7.0), "metrics.test.accuracy=7.0: expected 0 to 1"),
        (on_test(accuracy="x"), "metrics.test.accuracy='x': expected float"),
        (on_test(), "accuracy is missing"),
        (on_test(accuracy=True), "metrics.test.accuracy=True: expected float"),
        (
            on_test(nll=10**400),
            r"metrics.test.nll=10+\.\.\.: expected a finite number, at most 3\.4e\+38",
        ),
        ({"task": "magic"}, "unknown config.task.name: 'magic'"),
        ({"size_bytes": -1}, "size_bytes=-1: expected at least 0"),
        ({"versions": [1]}, r"versions=\[1\]: expected an object"),
        ({"exports": {"onnx": 5}}, "exports=.*expected an object of the measurements of files"),
        ({"arm_digest": 5}, "arm_digest=5: expected text"),
    ],
    ids=str,
)
def test_what_is_no_record_is_said_in_a_line(finished, copied, change, message):
    """Without a seal, as old ones and somebody else's are."""
    path = result(copied)
    record = {**files.read_json(path), **change}
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    pattern = f"^{re.escape(str(path))} is no record of this arm: {message}.*delete it"
    with pytest.raises(ConfigError, match=pattern) as raised:
        experiment.run(finished[0], copied)
    assert len(str(raised.value).splitlines()) == 1


def test_a_packed_file_that_is_not_the_records_is_refused(finished, copied):
    path = copied / "student" / "0" / "model.safetensors"
    shutil.copy(copied / "teacher" / "0" / "model.safetensors", path)  # which is sound itself
    with pytest.raises(ConfigError, match=r"is damaged, or not the file that its result\.json is"):
        experiment.run(finished[0], copied)
    path.unlink()
    result(copied).unlink()  # as it says
    experiment.run(finished[0], copied)
    assert packed_bytes(copied, "student") == packed_bytes(finished[1], "student")


def test_a_folder_that_another_holds_is_not_written(finished, copied):
    class Other(experiment.Progress):
        """A second run while the first is under way."""

        def arm(self, name, seeds, steps):
            thread = threading.Thread(target=self.run)
            thread.start()
            thread.join()

        def run(self):
            with pytest.raises(lock.HeldError, match="is in use by another thread"):
                experiment.run(finished[0], copied)
            self.refused = True

    other = Other()
    experiment.run(finished[0], copied, progress=other)
    assert other.refused
    assert "lock" not in {p.name for p in copied.iterdir()}


@pytest.mark.parametrize("role", ["teacher", "init"])
def test_the_teacher_may_be_made_of_other_arms(tiny_config, tmp_path, role):
    """Arms that it is made of are compared with no teacher: that comes later."""
    base = tiny_config()
    first, student = base["arms"]["teacher"], base["arms"]["student"]
    taught = {"teacher": "first", "distill": "kd"} if role == "teacher" else {"init": "first"}
    base["teacher"] = "assistant"
    base["arms"] = {
        "first": {**first, "epochs": 0.5},
        "assistant": {**first, "epochs": 0.5, **taught},
        "student": {**student, "epochs": 0.5, "teacher": "assistant", "distill": "kd"},
    }
    records = experiment.run(config.freeze(base), tmp_path)
    assert [record.status for record in records] == ["ok"] * 3
    agreement = {record.arm: record.value("agreement") for record in records}
    assert np.isnan(agreement["first"])
    assert agreement["assistant"] == 1.0
    assert 0 < agreement["student"] <= 1
    assert [record.kind for record in records][1] == "teacher"
