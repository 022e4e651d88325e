"""Energy: measured where the machine has a counter, and modelled, which is always said.

The model counts, for one example, the multiplications and additions of each layer at its bits, and
the reads and writes of its numbers. Constants are of 45 nm chips: Horowitz, "Computing's energy
problem", ISSCC 2014; below 8 bits the fits of QKeras (qtools) to them. It says which of two models
of one kind needs less, not what a device draws.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdq.quantize.layers import FLOAT_BITS, LayerInfo, layer_bits
from kdq.types import QParams

# Picojoules.
FLOAT_MULTIPLY, FLOAT_ADD = 3.7, 0.9
# A read of 64 bits from a memory of at most so many bytes; beyond the last, from DRAM.
SRAM = ((8 * 2**10, 10.0), (32 * 2**10, 20.0), (2**20, 100.0))
DRAM = 1300.0  # the least of 1300 to 2600
ACCUMULATOR_BITS = 32


@dataclasses.dataclass(frozen=True)
class Energy:
    """Nanojoules for one example, modelled."""

    arithmetic: float
    weights: float  # reading each once
    activations: float  # reading inputs and writing outputs

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.arithmetic + self.weights + self.activations


def integer_add(bits: int) -> float:
    """Returns the picojoules of an addition."""
    return 0.003125 * bits


def integer_multiply(bits: int, other_bits: int) -> float:
    """Returns the picojoules of a product; of equal bits it is the fit of QKeras."""
    return 0.0029948 * bits * other_bits + 0.0010417 * (bits + other_bits) / 2


def modelled(layers: Mapping[str, LayerInfo], qparams: QParams) -> dict[str, Energy]:
    """Returns the energy of each layer for one example, by path.

    A layer computes with integers if weight and input both have bits, else with float32. Weights
    are in the smallest memory that holds those of all layers, activations in the smallest that
    holds those of any one.
    """
    bits = {path: layer_bits(qparams, path) for path in layers}
    reads = memories(layers, bits)
    return {path: layer_energy(layer, *bits[path], reads) for path, layer in layers.items()}


def memories(
    layers: Mapping[str, LayerInfo], bits: Mapping[str, Sequence[int]]
) -> tuple[float, float]:
    """Returns the picojoules of a read of 64 bits of weights, and of activations.

    `bits` are (weight bits, activation bits) of each layer.
    """
    weight_bits = sum(layer.weight_count * bits[path][0] for path, layer in layers.items())
    moved = max((moved_bits(layer, bits[path][1]) for path, layer in layers.items()), default=0)
    read = lambda size: next((energy for most, energy in SRAM if size <= most), DRAM)
    return read(weight_bits / 8), read(moved / 8)


def layer_energy(
    layer: LayerInfo, weight_bits: int, activation_bits: int, memories: tuple[float, float]
) -> Energy:
    """Returns the energy of one layer for one example; `memories` are those of the whole model."""
    if FLOAT_BITS in (weight_bits, activation_bits):
        multiply, add = FLOAT_MULTIPLY, FLOAT_ADD
    else:
        multiply = integer_multiply(weight_bits, activation_bits)
        add = integer_add(ACCUMULATOR_BITS)
    moved = moved_bits(layer, activation_bits) * math.prod(layer.stack)
    return Energy(
        arithmetic=1e-3 * layer.macs * (multiply + add),
        weights=1e-3 * layer.weight_count * weight_bits / 64 * memories[0],
        activations=1e-3 * moved / 64 * memories[1],
    )


def moved_bits(layer: LayerInfo, bits: int) -> int:
    """Returns the bits that a layer reads and writes for one example, outputs as wide as inputs."""
    shapes = (layer.input_shape, layer.other_shape, layer.output_shape)
    return bits * sum(math.prod(shape[1:]) for shape in shapes if shape)


def measured(
    call: Callable[[], Any], *, seconds: float = 2.0, root: Path = Path("/sys/class/powercap")
) -> dict[str, Any] | None:
    """Measures the joules of a call, by the counters of the processor (RAPL) or of an NVIDIA GPU.

    Everything else that the machine does in the meantime is counted too. `call` does its work once,
    to the end; it is repeated for so many seconds at least. `root` has the counters of RAPL.

    Returns `{"joules", "calls", "source"}`; None where there is no counter: not measured.
    """
    for source, read in (("RAPL", lambda: _rapl(root)), ("NVML", _nvml)):
        before = read()
        if not before:
            continue
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < seconds:
            call()
            calls += 1
        after = read()
        joules = sum((after[name][0] - value) % limit for name, (value, limit) in before.items())
        return {"joules": joules / calls, "calls": calls, "source": source}
    return None


def _rapl(root: Path) -> dict[str, tuple[float, float]]:
    """Reads `{package: (joules, at which it starts again from 0)}`; {} without a counter."""
    counters = {}
    for zone in sorted(root.glob("intel-rapl:?")):  # those with a second number are parts of these
        with contextlib.suppress(OSError, ValueError):  # root alone may read it
            joules = 1e-6 * int((zone / "energy_uj").read_text())
            counters[zone.name] = joules, 1e-6 * int((zone / "max_energy_range_uj").read_text())
    return counters


def _nvml() -> dict[str, tuple[float, float]]:
    """Reads the same of NVIDIA's GPUs, which never start again."""
    try:
        import pynvml  # noqa: PLC0415
    except ImportError:
        return {}
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        read = pynvml.nvmlDeviceGetTotalEnergyConsumption  # millijoules since the driver started
        return {str(i): (1e-3 * read(handle), math.inf) for i, handle in enumerate(handles)}
    return {}
