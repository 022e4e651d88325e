"""Sweeps the temperature of distillation, over several seeds, in any config with `kd`.

python launch/sweep.py --config=configs/digits.py --workdir=runs/temperature --arm=kd \
    --sweep=configs/sweeps/temperature.py --executor=local
"""

from collections.abc import Iterator
from typing import Any

from kdq.config import parse_arg


def get_sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """Twelve runs; `arg` is "seeds=N" for more or fewer than 3 seeds of each temperature."""
    for temperature in (1.0, 2.0, 4.0, 8.0):
        for seed in range(parse_arg(arg, seeds=3).seeds):
            yield {"distill.kd.terms.kl.temperature": temperature, "seeds": (seed,)}
