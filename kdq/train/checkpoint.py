"""Checkpoints, by Orbax: the only file that imports it.

Orbax's files have no checksums that cover all of them, so each checkpoint has the digests of its
trees and of its record beside them: `STEP/digests/PROCESS.json`, written with them and checked
whenever they are read.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from kdq import files, interrupts, processes
from kdq.train import digests

log = logging.getLogger(__name__)

FORMAT = 1  # of the files of digests
_DIGESTS = "digests"
_LONGEST = 500  # characters of a reason


class CheckpointError(OSError):
    """A checkpoint that is missing, or that this version can't read; says what to do."""


class Checkpointer:
    """The checkpoints of one arm and seed, by step.

    A checkpoint has named pytrees of arrays and a JSON-able record. Writes are atomic and happen in
    the background; the two newest are kept, so that a damaged one has a predecessor. Arrays may be
    cut up over the devices of several processes, which then all save and restore.

    The directory is made if it does not exist; `alone`, this process reads by itself, whatever
    others there are.
    """

    def __init__(self, directory: str | os.PathLike[str], *, alone: bool = False):
        self._directory, self._alone = os.path.abspath(directory), alone
        self._do_once = (lambda fn: fn()) if alone else processes.first
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        if alone and jax.process_count() > 1:
            options = _alone()
        # What goes wrong in Orbax's threads is raised by `wait`; they log it as well, in kilobytes.
        self._quiet = lambda record: "orbax" not in record.pathname
        absl.logging.get_absl_logger().addFilter(self._quiet)
        with self._named_errors():
            try:
                self._manager = ocp.CheckpointManager(self._directory, options=options)
            except (TypeError, ValueError):  # a step whose own description is damaged
                self._do_once(functools.partial(_set_aside_undescribed, self._directory))
                self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, trees: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Saves `trees` and `record` as `step`, unless `step` is there already."""
        if step in self._manager.all_steps():
            return
        # Copies: the caller's next step donates its buffers while Orbax still reads.
        trees = {name: jax.tree.map(jnp.copy, tree) for name, tree in trees.items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items[_DIGESTS] = _DigestsSave(trees=trees, record=record)
        args = ocp.args.Composite(record=ocp.args.JsonSave(dict(record)), **items)
        self.wait()  # for the save before, which may take long
        with self._named_errors(), interrupts.held_back():
            self._manager.save(step, args=args)

    def restore(
        self, like: Mapping[str, Any | None]
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """`(step, trees, record)` of the newest checkpoint that can be read, or None.

        A checkpoint that can't be read, or is not what was saved, is named in a warning and renamed
        to "STEP.damaged"; the one before it is tried.

        `like` has for each tree wanted a pytree of its structure and shapes, which is restored to
        where that lies; or None to get it as nested dicts of NumPy arrays. CheckpointError for a
        newer format.
        """
        while steps := self.steps():
            if parts := self.read(max(steps), like):
                return max(steps), *parts
        return None

    def steps(self) -> list[int]:
        """Those that there are checkpoints of."""
        self.wait()
        return sorted(self._manager.all_steps())

    def read(
        self, step: int, like: Mapping[str, Any | None]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """`(trees, record)` of a step's checkpoint; None if it is damaged. See `restore`."""
        path = os.path.join(self._directory, str(step))
        parts = problem = None
        try:
            with interrupts.held_back():  # of which a checkpoint is not to blame either
                expected = _read_digests(path)
                parts = self._restore(step, like)
            if reason := expected and _difference(*parts, *expected):
                problem = f"is damaged and is set aside: {reason}"
        except (CheckpointError, MemoryError, PermissionError):
            raise  # of which a checkpoint is not to blame
        except Exception as error:  # a damaged file can raise anything
            _check_orbax(path, error)
            problem = f"can't be read and is set aside: {_reason(error)}"
        damaged = problem is not None
        if not (damaged if self._alone else processes.any_of(damaged)):
            return parts
        log.warning("checkpoint %s %s", path, problem or "is set aside: a process can't read it")
        self._do_once(functools.partial(_set_aside, path))
        self._manager.reload()
        return None

    def _restore(
        self, step: int, like: Mapping[str, Any | None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        items = {}
        for name, tree in like.items():
            if tree is None:  # NumPy arrays of these shapes, without memory of their own
                path = epath.Path(self._directory) / str(step) / name
                arrays = ocp.StandardCheckpointHandler().metadata(path).tree
                on_host = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape)
                shapes = jax.tree.map(on_host, arrays)
            else:
                shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            items[name] = ocp.args.StandardRestore(shapes)
        args = ocp.args.Composite(record=ocp.args.JsonRestore(), **items)
        restored = self._manager.restore(step, args=args)
        return {name: restored[name] for name in like}, restored["record"]

    def drop_after(self, step: int) -> None:
        """Deletes later checkpoints: those of a run that begins again at `step`."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def wait(self) -> None:
        """Returns when everything saved is on disk; OSError if the disk is full or unwritable."""
        with self._named_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._named_errors(), interrupts.held_back(2):
            self._manager.close()
        absl.logging.get_absl_logger().removeFilter(self._quiet)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """A full disk and the like in a line: TensorStore raises a ValueError of kilobytes."""
        try:
            with files.named_errors(self._directory):
                yield
        except ValueError as error:
            if not (code := re.search(r"os_error_code='(\d+)'", str(error))):
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), self._directory) from None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lost = kind is not None and issubclass(kind, jax.errors.JaxRuntimeError)
        if lost and jax.process_count() > 1:
            return  # to close is to wait for processes that may be gone
        self.close()


def _alone() -> ocp.CheckpointManagerOptions:
    """Makes options of a manager that waits for no other process."""
    process, options = jax.process_index(), {}
    if jax.process_count() > 1:
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=process,
            active_processes={process},
            barrier_sync_key_prefix=f"own{process}",
        )
    return ocp.CheckpointManagerOptions(create=False, **options)


def _set_aside_undescribed(directory: str) -> None:
    """Sets aside the checkpoints that keep Orbax from listing a folder."""
    steps = [name for name in os.listdir(directory) if name.isdigit()]
    for step in sorted(steps, key=int):
        path = os.path.join(directory, step)
        with tempfile.TemporaryDirectory() as scratch:  # in which it is the only one
            os.symlink(path, os.path.join(scratch, step))
            try:
                ocp.CheckpointManager(scratch, options=_alone()).close()
            except (TypeError, ValueError) as error:
                log.warning(
                    "checkpoint %s can't be read and is set aside: %s", path, _reason(error)
                )
                _set_aside(path)


def _reason(error: Exception) -> str:
    """Returns what went wrong in a line; TensorStore's goes on with its whole specification."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line.partition(" [tensorstore_spec=")[0][:_LONGEST]


def _set_aside(path: str) -> None:
    """Renames to "PATH.damaged", or "PATH.damaged.2" and so on where that is taken."""
    for n in itertools.count(1):
        target = f"{path}.damaged" if n == 1 else f"{path}.damaged.{n}"
        if not os.path.exists(target):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.rename(path, target)
            return


def _read_digests(path: str) -> tuple[dict[str, digests.Digests], str] | None:
    """Returns those of a checkpoint's trees and of its record; None from before there were any.

    Raises:
      CheckpointError: it is of a newer format.
      DamagedError, KeyError, OSError, TypeError, ValueError: the digests are damaged themselves.
    """
    folder = os.path.join(path, _DIGESTS)
    if not os.path.isdir(folder):
        return None
    first = files.read_json(os.path.join(folder, "0.json"))
    if first["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} is of format {first['format']}, and this version of kdq reads up "
            f"to {FORMAT}: install a newer one, or delete the checkpoint"
        )
    others = range(1, first["processes"])
    parts = [first, *(files.read_json(os.path.join(folder, f"{i}.json")) for i in others)]
    trees = {
        name: digests.parse(row for part in parts for row in part["trees"][name])
        for name in first["trees"]
    }
    return trees, first["record"]


def _difference(
    trees: Mapping[str, Any],
    record: Mapping[str, Any],
    expected: Mapping[str, digests.Digests],
    seal: str,
) -> str | None:
    """Returns what is other than was saved, in words; None if nothing is."""
    wrong = {name: digests.difference(tree, expected[name]) for name, tree in trees.items()}
    wrong["record"] = None if files.seal(record)[files.SEAL] == seal else "its values are others"
    return next((f"{name}: {why}" for name, why in wrong.items() if why), None)


def _check_orbax(path: str, error: Exception) -> None:
    """Raises CheckpointError if a newer Orbax saved what this one can't read."""
    numbers = lambda version: tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])
    try:
        saved_by = files.read_json(os.path.join(path, _DIGESTS, "0.json"))["orbax"]
        newer = numbers(saved_by) > numbers(ocp.__version__)
    except (OSError, ValueError, KeyError, TypeError):
        return
    if newer:
        raise CheckpointError(
            f"checkpoint {path} was saved by Orbax {saved_by}, and Orbax {ocp.__version__} can't "
            f"read it: pip install 'orbax-checkpoint>={saved_by}', or delete the checkpoint"
        ) from error


class _DigestsHandler(ocp.AsyncCheckpointHandler):
    """Writes digests while Orbax writes the arrays: hashing must not keep the loop waiting."""

    async def async_save(
        self, directory: epath.Path, args: "_DigestsSave"
    ) -> list[future.Future] | None:
        async def write() -> None:
            self.save(directory, args)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="digests")]

    def save(self, directory: epath.Path, args: "_DigestsSave") -> None:
        document = {
            "format": FORMAT,
            "orbax": ocp.__version__,
            "processes": jax.process_count(),
            "trees": {name: digests.make_digests(tree) for name, tree in args.trees.items()},
            "record": files.seal(args.record)[files.SEAL],
        }
        path = directory / f"{jax.process_index()}.json"
        path.write_text(files.json_text(document, indent=None))

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        return _read_digests(os.fspath(directory.parent))


@ocp.args.register_with_handler(_DigestsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _DigestsSave(ocp.args.CheckpointArgs):
    """The contents of a checkpoint, to be digested; of no account where it is read."""

    trees: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
