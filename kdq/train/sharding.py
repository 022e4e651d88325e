"""Where arrays live: on one device, or cut up over a mesh of many in one process or several.

The mesh has three axes. Batches are cut along `data` and `fsdp`; the large arrays of the state and
of the teacher along `fsdp` and `tensor`, by their paths and shapes, so the optimizer's moments lie
where their parameters do. XLA's partitioner does the rest (Auto axis types): the program is that of
one device.
"""

import dataclasses
import re
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdq import schema
from kdq.config import ConfigError
from kdq.types import Batch

AXES = ("data", "fsdp", "tensor")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what lies where on it; hashable, so a compiled step can be keyed by it."""

    mesh: Mesh | None = None  # None: one device, and nothing to do
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # the first whose pattern is found
    least: int = 0  # arrays of fewer elements are not cut

    @property
    def size(self) -> int:
        """Number of devices in the mesh."""
        return self.mesh.size if self.mesh else 1

    @property
    def batch_parts(self) -> int:
        """Number of parts that a batch is cut into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1

    @property
    def must_wait(self) -> bool:
        """True if each step has to end before the next: virtual CPU devices of one process can
        deadlock in a collective when several steps are under way."""
        if not self.mesh:
            return False
        return self.mesh.devices.flat[0].platform == "cpu" and len(self.mesh.local_devices) > 1

    # Placing, outside of jit.

    def place(self, tree: T) -> T:
        """A tree that every process has whole, cut up by the rules."""
        return self._put(tree, self.shardings(tree)) if self.mesh else tree

    def copy(self, tree: T) -> T:
        """A tree that every process has whole, whole on every device."""
        if not self.mesh:
            return jax.device_put(tree)
        return self._put(tree, self._named())

    def batch(self, rows: Batch) -> Batch:
        """This process's rows of a global batch (see `rows_of`), as global arrays."""
        if not self.mesh:
            return rows
        sharding = self._named(("data", "fsdp"))
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in rows.items()}

    def whole_batch(self, array: np.ndarray) -> Any:
        """A global batch that every process has whole, cut along its first axis."""
        if not self.mesh:
            return jax.device_put(array)
        return self._put(array, self._named(("data", "fsdp")))

    def rows_of(self, batch_size: int) -> tuple[int, int]:
        """`(index, count)`: this process needs part `index` of `count` equal parts of a batch.

        Processes that share the rows, as those of a tensor axis do, have the same index.
        """
        if not self.mesh:
            return 0, 1
        places = self._named(("data", "fsdp")).addressable_devices_indices_map((batch_size,))
        bounds = [place[0].indices(batch_size) for place in places.values()]
        starts, stops = ({bound[i] for bound in bounds} for i in (0, 1))
        size = max(stops) - min(starts)
        if len(starts) * (batch_size // self.batch_parts) != size or min(starts) % size:
            raise ConfigError(
                f"config.mesh {dict(self.mesh.shape)}: a process would need rows {sorted(starts)} "
                f"of a batch of {batch_size}, which lie apart: `tensor` times the processes "
                "must fit the devices of each"
            )
        return min(starts) // size, batch_size // size

    def fetch(self, tree: T) -> T:
        """A tree from the mesh, whole, as NumPy arrays in every process."""
        if not self.mesh:
            return tree
        return jax.tree.map(whole, tree)

    # Within jit.

    def constrain(self, tree: T) -> T:
        """Keeps a tree where `place` put it."""
        if not self.mesh:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def gather(self, tree: T) -> T:
        """A tree of parameters as a layer uses them: whole along `fsdp`, still cut by `tensor`.

        So that the partitioner moves weights, not activations; gradients go the way back.
        """
        if not self.mesh:
            return tree
        whole_again = lambda axis: axis if axis == "tensor" else None
        shardings = jax.tree.map(
            lambda sharding: self._named(*(whole_again(axis) for axis in sharding.spec)),
            self.shardings(tree),
        )
        return jax.lax.with_sharding_constraint(tree, shardings)

    def replicate(self, tree: T) -> T:
        """Whole on every device."""
        if not self.mesh:
            return tree
        return jax.lax.with_sharding_constraint(tree, self._named())

    # Rules.

    def shardings(self, tree: T) -> T:
        """A sharding for each array of a tree, by its path and shape."""
        return jax.tree.map_with_path(lambda path, x: self._named(*self._axes(path, x)), tree)

    def _axes(self, path: Any, array: Any) -> tuple[str | None, ...]:
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(array)
        for pattern, axes in self.rules:
            if re.search(pattern, name) and len(axes) == len(shape):
                for size, axis in zip(shape, axes, strict=True):
                    if axis and size % self.mesh.shape[axis]:
                        raise ConfigError(
                            f"config.mesh.rules: {name} {tuple(shape)} can't be cut as "
                            f"{tuple(axes)}: {size} is no multiple of "
                            f"{axis}={self.mesh.shape[axis]}"
                        )
                return axes
        if len(shape) < 2 or np.prod(shape) < self.least:
            return ()
        # The features that come out by `tensor`; the largest axis of what is left by `fsdp`.
        axes: list[str | None] = [None] * len(shape)
        if self.mesh.shape["tensor"] > 1 and shape[-1] % self.mesh.shape["tensor"] == 0:
            axes[-1] = "tensor"
        fits = lambda i: axes[i] is None and shape[i] % self.mesh.shape["fsdp"] == 0
        if self.mesh.shape["fsdp"] > 1 and (free := list(filter(fits, range(len(shape))))):
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
        return tuple(axes)

    def _named(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _put(self, tree: Any, shardings: Any) -> Any:
        def put(x, sharding):
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return jax.device_put(x, sharding)  # it is on the mesh already
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        if isinstance(shardings, NamedSharding):
            return jax.tree.map(lambda x: put(x, shardings), tree)
        return jax.tree.map(put, tree, shardings)


ONE_DEVICE = Layout()


def make_layout(config: schema.Mesh) -> Layout:
    """The layout of a config, on the devices of all processes.

    Raises ConfigError for more devices than there are, or rules that no mesh can follow.
    """
    devices, sizes = jax.devices(), [config.data, config.fsdp, config.tensor]
    where = f"config.mesh data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"{where}: expected sizes of at least 1, or one -1 for all that are left")
    known = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    count = int(np.prod(sizes))
    if count == 0 or count > len(devices):
        raise ConfigError(f"{where}: there are {len(devices)} devices")
    if jax.process_count() > 1 and count != len(devices):
        raise ConfigError(
            f"{where}: {jax.process_count()} processes have {len(devices)} devices, all of which "
            "must take part: set config.mesh.data=-1"
        )
    rules = tuple((rule["path"], tuple(rule["axes"])) for rule in config.rules)
    for path, axes in rules:
        if unknown := {axis for axis in axes if axis} - set(AXES):
            raise ConfigError(
                f"config.mesh.rules, {path!r}: unknown axes {sorted(unknown)}; valid: {AXES}, None"
            )
    if count == 1:
        return ONE_DEVICE
    types = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices[:count])
    return Layout(mesh=mesh, rules=rules, least=config.least)


def whole(array: Any) -> np.ndarray:
    """An array as NumPy has it, from wherever its parts are. All processes have to ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
