r"""The config with which a workdir was last run, to run it or one of its arms again elsewhere.

python launch/train.py --config=configs/saved/workdir.py:runs/digits --workdir=runs/again \
    --arm=kd --seed=0

Models defined outside kdq are imported only with --allow_models=MODULE.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdq import files, trust
from kdq.config import ConfigError


def get_config(arg: str | None = None) -> ConfigDict:
    """The experiment of the folder `arg`."""
    path = Path(arg or "", "config.json")
    if not arg or not path.is_file():
        raise ConfigError(
            f"--config=configs/saved/workdir.py:{arg or ''}: want a folder of launch/compress.py "
            f"after the colon; there is no {path}"
        )
    document = files.read_json(path)
    try:
        for fields in document["models"].values():
            trust.check(fields["name"], str(path))
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no config of an experiment: {error!r}") from error
    return ConfigDict(_tuples(document), sort_keys=False)


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
