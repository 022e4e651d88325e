"""Sweeps the bits of the first and last layer, usually 8, with the others at W4A4.

python launch/sweep.py --config=configs/digits.py --workdir=runs/bits --arm=qad_w4a4_kd \
    --sweep=configs/sweeps/bits.py --executor=slurm --slurm=partition=short
"""

from collections.abc import Iterator
from typing import Any


def get_sweep() -> Iterator[dict[str, Any]]:
    """Four runs, with the resources that each asks for."""
    for bits in (2, 3, 4, 8):
        yield {
            "name": f"keep_w{bits}",
            "quantize.keep_bits": bits,
            "resources.cpus": 2,
            "resources.memory_gib": 4.0,
            "resources.minutes": 30,
        }
