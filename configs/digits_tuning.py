"""The grid from which the hyper-parameters of digits.py were chosen, on the validation split.

python launch/compress.py --config=configs/digits_tuning.py --workdir=runs/digits_tuning

Choices are made by the metrics on validation, never by those on test. The seeds differ from those
of digits.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from kdq.arms import kl
from kdq.config import complete, parse_arg

RATES = {"1e-3": 1e-3, "3e-3": 3e-3, "1e-2": 1e-2}


def get_config(arg: str | None = None) -> ConfigDict:
    """The grid. `arg` is "seeds=N"."""
    arg = parse_arg(arg, seeds=3)
    digits = runpy.run_path(str(Path(__file__).with_name("digits.py")))
    config = digits["get_config"]()
    config.seeds = tuple(range(100, 100 + arg.seeds))
    base = {name: dict(fields) | {"reference": ""} for name, fields in config.arms.items()}
    arms = {name: base[name] for name in ("teacher", "student", "kd")}
    for alpha in (0.5, 0.9):
        for temperature in (2.0, 4.0, 8.0):
            recipe = f"kd_alpha{100 * alpha:.0f}_t{temperature:.0f}"
            config.distill[recipe] = kl(alpha=alpha, temperature=temperature)
            arms[recipe] = base["kd"] | {"distill": recipe}
    for name, fields in base.items():
        if name == "student" or name.endswith("_longer") or name.startswith(("qat", "qad")):
            for label, rate in RATES.items():
                arms[f"{name}_lr{label}"] = fields | {"learning_rate": rate}
    config.arms = ConfigDict(arms, sort_keys=False)
    return complete(config)
