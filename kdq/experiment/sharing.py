"""Arms that are the same bits as others: of several runs of a sweep, or of searches that agree.

They are trained once and copied. In a sweep's folder KEY.json says where an arm and seed is that
has been trained, and KEY.lock is held by the run that trains it, for which the others wait. A run
that is killed lets go of it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdq import config as kdq_config
from kdq import files
from kdq.config import Experiment
from kdq.experiment import exports, searching
from kdq.experiment.context import Context
from kdq.experiment.store import PACKED, RESULT, Store, file_digest
from kdq.record import ArmRecord
from kdq.search.problem import InfeasibleError

log = logging.getLogger(__name__)

# All that decides the bits of an arm and seed, as its record says it.
DECIDING = ("arm", "seed", "kind", "bits", "observer", "arm_digest", "versions", "device", "data")
# Of two arms that are the same bits these differ.
OF_THE_ARM = ("arm", "kind", "bits", "reference", "config_digest", "arm_digest")
# What a run's own config decides, or what other arms of the run add.
NOT_COPIED = (RESULT, exports.FOLDER, "caches")


class Shared:
    """The folder by which runs of a sweep share arms, as one of the runs sees it."""

    def __init__(self, folder: str | os.PathLike[str], experiment: Experiment, store: Store):
        self._folder, self._experiment, self._store = Path(folder).absolute(), experiment, store

    def covers(self, name: str) -> bool:
        """Returns whether an arm can be copied: it is the same bits wherever it is trained.

        Not with several seeds at once, which are one program with the others; nor where a search
        finds bits, which may go by what it has timed.
        """
        alone = self._experiment.seeds_at_once == 1
        searched = [
            arm
            for arm in kdq_config.ancestors(self._experiment, name)
            if self._experiment.arms[arm].bits in self._experiment.searches
        ]
        return alone and not searched

    def once(self, identity: ArmRecord, train: Callable[[], ArmRecord]) -> ArmRecord:
        """Returns the record of an arm and seed: copied, or else trained while others wait."""
        with self._locked(identity):
            if source := self._source(identity):
                changed = {key: getattr(identity, key) for key in ("config_digest", "reference")}
                target = self._store.folder(identity.arm, identity.seed)
                with contextlib.suppress(OSError):  # it is deleted meanwhile, and trained here then
                    return copy(self._store, source, target, changed)
            record = train()
            self.offer(record)
        return record

    def offer(self, record: ArmRecord) -> None:
        """Lets other runs copy an arm that this run has trained, unless they have one to copy."""
        if record.status != "ok" or record.shared_from or not self.covers(record.arm):
            return
        if self._trained(record) is None:
            folder = self._store.folder(record.arm, record.seed).absolute()
            pointer = {"folder": os.path.relpath(folder, self._folder)}
            files.write_json(self._path(record, "json"), pointer)

    def _path(self, record: ArmRecord, kind: str) -> Path:
        document = record.to_json()
        deciding = {key: document.get(key) for key in DECIDING}
        digest = kdq_config.digest({**deciding, "mesh": self._experiment.mesh})
        return self._folder / f"{record.arm}-{record.seed}-{digest}.{kind}"

    @contextlib.contextmanager
    def _locked(self, identity: ArmRecord) -> Iterator[None]:
        path = self._path(identity, "lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning(
                    "arm %s, seed %d: another run trains it, this one waits",
                    identity.arm,
                    identity.seed,
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # then two may train it, each in its own workdir
                log.warning("%s can't be locked: %s", path, error.strerror)
            yield

    def _trained(self, identity: ArmRecord) -> Path | None:
        """Returns the folder of the run that has trained the same arm and seed, if it is there."""
        try:
            pointer = files.read_json(self._path(identity, "json"))
            folder = Path(os.path.normpath(self._folder / pointer["folder"]))
            record = ArmRecord.from_json(files.read_json(folder / RESULT))
            same = self._path(record, "json") == self._path(identity, "json")
            return folder if same and record.status == "ok" else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # deleted, or damaged
            return None

    def _source(self, identity: ArmRecord) -> Path | None:
        """Returns what can be copied: arms that it needs are in both runs the same bits."""
        name, seed = identity.arm, identity.seed
        folder = self._trained(identity)
        if folder is None or folder == self._store.folder(name, seed).absolute():
            return None
        needed = set(kdq_config.parents(self._experiment, name))
        if name not in kdq_config.ancestors(self._experiment, self._experiment.teacher):
            needed.add(self._experiment.teacher)  # which it is compared with
        for other in needed:
            there = folder.parents[1] / other / str(seed) / PACKED
            here = self._store.folder(other, seed) / PACKED
            if not (there.is_file() and here.is_file() and _sha256(there) == _sha256(here)):
                return None
        return folder


def copy_equal_bits(context: Context, identity: ArmRecord) -> ArmRecord | None:
    """Copies the arm that an arm is compared with, if both searches chose the same bits.

    If the arms are else alike, that one has been trained as this one would be. Returns the record,
    or None if there is no such arm.
    """
    experiment, store = context.experiment, context.store
    name, seed = identity.arm, identity.seed
    arm, reference = experiment.arms[name], experiment.arms.get(experiment.arms[name].reference)
    if reference is None or {arm.bits, reference.bits} - experiment.searches.keys():
        return None
    free = {"bits": "", "reference": ""}
    source = store.folder(arm.reference, seed)
    if dataclasses.replace(arm, **free) != dataclasses.replace(reference, **free) or not (
        (source / RESULT).is_file()
    ):
        return None
    record = store.record(arm.reference, seed)
    if (record.status, record.arm_digest) != ("ok", store.digests[arm.reference]):
        return None
    try:
        here, there = (searching.result(context, bits, seed) for bits in (arm.bits, reference.bits))
    except InfeasibleError:
        return None  # which is told when the arm is run
    if (here.chosen, here.observer) != (there.chosen, there.observer):
        return None
    changed = {key: getattr(identity, key) for key in OF_THE_ARM} | here.record
    return copy(store, source, store.folder(name, seed), changed)


def copy(store: Store, source: Path, target: Path, changed: Mapping[str, Any]) -> ArmRecord:
    """Copies an arm and seed, whole or not at all, and returns its record with what is changed."""
    record = ArmRecord.from_json(files.read_json(source / RESULT))
    partial = target.with_name(f".{target.name}.copy")
    shutil.rmtree(partial, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*NOT_COPIED))
        shutil.rmtree(target, ignore_errors=True)  # what a run that was killed has begun
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shared_from = os.path.relpath(source.absolute(), store.workdir.absolute())
    record = dataclasses.replace(record, **{**changed, "exports": {}, "shared_from": shared_from})
    store.save(record)  # last: with it the arm is finished
    return record


def _sha256(path: Path) -> str:
    return _digest_of(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, modified: int) -> str:
    return file_digest(path)
