"""What a config says of data, layers and teachers is checked before anything trains."""

import runpy
from pathlib import Path

import pytest

from kdq import config, experiment
from kdq.experiment import check
from kdq.experiment.context import Context

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=() if p.stem == "digits" else pytest.mark.slow)
        for p in CONFIGS
        if '"name": "fashion_mnist"' not in p.read_text()
    ],
    ids=lambda p: p.stem,
)
def test_shipped_configs_fit_their_data_and_models(path, data_dir, tmp_path):
    """Every layer, recipe and class that they name is there; nothing is trained."""
    shipped = runpy.run_path(str(path))["get_config"]()
    shipped.data.data_dir = str(data_dir)
    frozen = config.freeze(shipped)
    context = Context(frozen, tmp_path / "run")
    check.check(context, list(frozen.arms))
    assert all(context.inputs.last_step(arm) > 0 for arm in frozen.arms.values() if arm.epochs)
    assert not (tmp_path / "run").exists()


def test_stopping_early_and_leaving_classes_out_shorten_the_training(tiny_config):
    base = tiny_config()
    arms = base["arms"]
    arms["short"] = arms["student"] | {"epochs": 4.0, "stop": 1.0}
    arms["without"] = arms["student"] | {"without_classes": (3, 5)}
    frozen = config.freeze(base)
    inputs = Context(frozen, Path("nowhere")).inputs
    steps = {name: inputs.steps(arm) for name, arm in frozen.arms.items()}
    last = {name: inputs.last_step(arm) for name, arm in frozen.arms.items()}
    # 1,077 examples in batches of 64.
    assert (steps["student"], last["student"]) == (17, 17)
    assert (steps["short"], last["short"]) == (67, 17)
    labels = inputs.labels[inputs.ids(frozen.arms["without"])]
    assert set(labels) == set(range(10)) - {3, 5}
    assert steps["without"] == round(len(labels) / 64)
    stream = inputs.stream(frozen.arms["without"], seed=0)
    seen = {int(i) for step in range(steps["without"]) for i in stream[step]["id"]}
    assert seen <= set(inputs.ids(frozen.arms["without"]))
    assert len(seen) > 0.95 * len(labels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accumulate": 3}, "batch_size=64 is no multiple.*accumulate=3"),
        ({"remat": "block_.*"}, "config.compute.remat='block_.*' matches none of.*conv_0"),
    ],
)
def test_how_a_step_is_computed(tiny_config, tmp_path, given, message):
    frozen = config.freeze({**tiny_config(), "compute": given})
    with pytest.raises(config.ConfigError, match=message):
        experiment.run(frozen, tmp_path)
    assert not list(tmp_path.iterdir())
