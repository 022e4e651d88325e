"""Checkpoints, by Orbax: the only file that imports it."""

import contextlib
import errno
import functools
import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kdq import processes

log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one arm and seed, by step.

    A checkpoint has named pytrees of arrays and a JSON-able record. Writes are atomic and happen in
    the background; the two newest are kept, so that a damaged one has a predecessor. Arrays may be
    cut up over the devices of several processes, which then all save and restore.

    Args:
      directory: made if it does not exist.
      alone: this process reads by itself, whatever others there are.
    """

    def __init__(self, directory: str | os.PathLike[str], *, alone: bool = False):
        self._directory = os.path.abspath(directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        if alone and jax.process_count() > 1:
            own = jax.process_index()
            options = ocp.CheckpointManagerOptions(
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"own{own}"
                ),
            )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, trees: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Saves `trees` and `record` as `step`, unless `step` is there already."""
        if step in self._manager.all_steps():
            return
        # Copies: the caller's next step donates its buffers while Orbax still reads.
        items = {k: ocp.args.StandardSave(jax.tree.map(jnp.copy, t)) for k, t in trees.items()}
        args = ocp.args.Composite(record=ocp.args.JsonSave(dict(record)), **items)
        with self._full_disk():
            self._manager.save(step, args=args)

    def restore(
        self, like: Mapping[str, Any | None]
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """`(step, trees, record)` of the newest checkpoint that can be read, or None.

        Args:
          like: for each tree wanted, a pytree of its structure and shapes, which is restored to
            where that lies; or None to get it as nested dicts of NumPy arrays.

        A checkpoint that can't be read is named in a warning and renamed to "STEP.damaged"; the
        one before it is tried.
        """
        while steps := self.steps():
            if found := self.read(max(steps), like):
                return max(steps), *found
        return None

    def steps(self) -> list[int]:
        """Those that there are checkpoints of."""
        self.wait()
        return sorted(self._manager.all_steps())

    def read(
        self, step: int, like: Mapping[str, Any | None]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """`(trees, record)` of a step's checkpoint; None if it can't be read. See `restore`."""
        try:
            items = {
                name: ocp.args.StandardRestore(
                    self._on_host(step, name)
                    if tree is None
                    else jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
                )
                for name, tree in like.items()
            }
            args = ocp.args.Composite(record=ocp.args.JsonRestore(), **items)
            found = self._manager.restore(step, args=args)
            return {name: found[name] for name in like}, found["record"]
        except Exception as error:  # a damaged file can raise anything
            path = os.path.join(self._directory, str(step))
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            log.warning("checkpoint %s can't be read and is set aside: %s", path, reason)
            processes.first(functools.partial(_set_aside, path))
            self._manager.reload()
            return None

    def drop_after(self, step: int) -> None:
        """Deletes later checkpoints: those of a run that begins again at `step`."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def _on_host(self, step: int, name: str) -> Any:
        """What a tree of a checkpoint is like, as NumPy arrays without memory of their own."""
        path = epath.Path(self._directory) / str(step) / name
        found = ocp.StandardCheckpointHandler().metadata(path).tree
        return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), found)

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what went wrong in the background.

        Raises:
          OSError: the disk is full.
        """
        with self._full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._full_disk():
            self._manager.close()

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Says so in a line: TensorStore raises a ValueError of kilobytes."""
        try:
            yield
        except ValueError as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            message = os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, message, self._directory) from None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lost = kind is not None and issubclass(kind, jax.errors.JaxRuntimeError)
        if lost and jax.process_count() > 1:
            return  # to close is to wait for processes that may be gone
        self.close()


def _set_aside(path: str) -> None:
    """Renames to "PATH.damaged", or "PATH.damaged.2" and so on where that is taken."""
    for n in itertools.count(1):
        target = f"{path}.damaged" if n == 1 else f"{path}.damaged.{n}"
        if not os.path.exists(target):
            os.rename(path, target)
            return
