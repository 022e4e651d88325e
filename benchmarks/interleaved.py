"""Parts that benchmarks share: variants that take turns, and the record of measurements."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from kdq import heap, provenance
from kdq.deploy.measure import latency

Step = Callable[[], Any]  # does its work once and returns arrays to wait for


KEEP = flags.DEFINE_bool("keep_freed_memory", True, "As the programs in launch/ do; see kdq.heap.")


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main` as `app.run` does, on the heap that the flag asks for."""

    def call(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {argv[1:]}")
        if KEEP.value:
            heap.keep_freed_memory()
        main(argv)

    app.run(call)


def take_turns(
    steps: Mapping[str, Step], base: str, *, rounds: int, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each step, and of its ratio to `base` round by round.

    Machines are noisy: what slows one round slows all of its steps.
    """
    ready = {name: lambda step=step: jax.block_until_ready(step()) for name, step in steps.items()}
    measured = latency.seconds(ready, rounds=rounds, warmup=warmup, least_seconds=0)
    rows = {}
    for name, seconds in measured.items():
        low, mid, high = np.percentile(seconds / measured[base], (25, 50, 75))
        rows[name] = {
            "milliseconds": round(1e3 * float(np.median(seconds)), 2),
            "ratio": round(float(mid), 3),
            "quartiles": [round(float(low), 3), round(float(high), 3)],
        }
    return rows


def show(title: str, rows: Mapping[str, Any]) -> None:
    """Prints one setting's rows to the terminal."""
    print(title, file=sys.stderr)
    for name, row in rows.items():
        print(f"  {name:42s} {row}", file=sys.stderr)


def publish(figures: Mapping[str, Any], out: str | None, **settings: Any) -> None:
    """Writes the figures with their record to the file `out`, or prints them."""
    record = {
        **settings,
        "keep_freed_memory": KEEP.value,
        "figures": figures,
        "device": provenance.device(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    text = json.dumps(record, indent=1) + "\n"
    if out:
        Path(out).write_text(text)
    else:
        print(text)
