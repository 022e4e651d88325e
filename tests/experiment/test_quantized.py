"""Where an arm's quantizers come from: bits, rules of the config, chains of methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import config, quantize
from kdq.config import ConfigError
from kdq.experiment.inputs import Inputs
from kdq.experiment.progress import Progress
from kdq.experiment.quantized import quantized, rules_of
from kdq.models import build
from kdq.quantize import FORMATS, MinMax, uniform_rules
from kdq.quantize.inputs import as_batches

RULES = {
    "mixed": (
        {"path": "head", "weights": {"format": "nf4", "granularity": "per_channel"}},
        {
            "path": "conv_.*",
            "weights": {"bits": 4, "granularity": "per_group", "group_size": 2},
            "activations": {"bits": 8, "dynamic": True, "granularity": "per_token"},
        },
    ),
    "observed": ({"path": ".*", "activations": {"bits": 4, "observer": "min_max"}},),
}


@pytest.fixture(scope="module")
def case():
    model = build("cnn", num_classes=10, widths=(4, 6))
    rng = np.random.default_rng(0)
    images = [jnp.asarray(rng.normal(size=(8, 8, 8, 2)), jnp.float32) for _ in range(2)]
    return model, jax.jit(model.init)(jax.random.key(0), images[0]), images


def frozen(tiny_config, **arm):
    fields = tiny_config() | {"rules": RULES}
    fields["arms"]["ptq"] = {"model": "student", "init": "student"} | arm
    experiment = config.freeze(fields)
    return experiment, experiment.arms["ptq"]


def start(tiny_config, case, **arm):
    return quantized(
        *frozen(tiny_config, **arm), *case, guide=None, progress=Progress(), categorical=True
    )


def test_an_arm_may_name_rules_of_formats_groups_and_dynamic_ranges(tiny_config, case):
    weights, told = start(tiny_config, case, bits="mixed")
    head, conv = weights.qparams["head"], weights.qparams["conv_1"]
    assert set(head) == {"weights"}
    np.testing.assert_array_equal(head["weights"].levels, np.float32(FORMATS["nf4"].levels))
    assert conv["weights"].scale.shape == (1, 1, 2, 6)  # 4 inputs in groups of 2
    assert conv["activations"].dynamic is not None
    assert "ptq_errors" not in told
    by_bits, _ = start(tiny_config, case, bits="W4A4")
    assert by_bits.qparams["conv_1"]["weights"].scale.shape == (1, 1, 1, 6)


def test_the_observer_is_the_rules_own_or_else_the_arms(tiny_config):
    (rule,) = rules_of(*frozen(tiny_config, bits="observed", observer="mse"))
    assert rule.activations.observer == MinMax()
    first, _ = rules_of(*frozen(tiny_config, bits="mixed", observer="entropy"))
    assert first.weights.observer == quantize.Entropy()


def test_the_record_has_the_errors_before_and_after(tiny_config, case):
    """The KL after the chain is that of the weights that are returned, in float64."""
    weights, told = start(tiny_config, case, bits="W3A8", ptq="corrected")
    errors = told["ptq_errors"]
    assert list(errors["layers"]) == ["conv_0", "conv_1", "head"]
    model, variables, images = case
    run = lambda v, q: jnp.concatenate([quantize.predict(model, v, q, x) for x in images])
    logits = [
        np.float64(jax.nn.log_softmax(run(v, q)))
        for v, q in ((variables, {}), (weights.variables, weights.qparams))
    ]
    expected = (np.exp(logits[0]) * (logits[0] - logits[1])).sum(-1).mean()
    assert errors["kl"][1] == pytest.approx(expected, rel=1e-3)
    assert errors["kl"][0] != pytest.approx(errors["kl"][1], rel=1e-3)
    assert told["calibration_seconds"] > 0
    assert told["compile_seconds"] >= 0


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": ".*", "weight": {"bits": 4}}, [r"rules.mixed\[0\]", "'weight'", "weights"]),
        ({"weights": {"bits": 4}}, [r"rules.mixed\[0\].path is missing"]),
        ({"path": ".*", "weights": {"bit": 4}}, [r"mixed\[0\].weights", "'bit'", "bits"]),
        ({"path": ".*", "weights": {"bits": 9}}, [r"mixed\[0\]", "bits=9", "1 to 8"]),
        ({"path": ".*", "weights": {"format": "fp5"}}, ["'fp5'", "fp8_e4m3"]),
        (
            {"path": ".*", "weights": {"bits": 4, "observer": "msee"}},
            [r"weights.observer", "'msee'", "'mse'"],
        ),
    ],
)
def test_what_a_rule_may_not_say(tiny_config, entry, words):
    experiment, arm = frozen(tiny_config, bits="mixed")
    object.__setattr__(experiment, "rules", {"mixed": (entry,)})
    with pytest.raises(ConfigError, match="(?s)" + ".*".join(words)):
        rules_of(experiment, arm)


def test_bits_that_are_neither_a_width_nor_rules(tiny_config):
    with pytest.raises(ConfigError, match=r"bits='mix': expected 'W4A4'.*'mixed', 'observed'"):
        frozen(tiny_config, bits="mix")


@pytest.mark.parametrize("tokens", [False, True])
def test_calibration_does_not_see_the_padding_of_batches(tiny_config, case, monkeypatch, tokens):
    model, variables, (images, _) = case
    experiment, _ = frozen(tiny_config)
    inputs = Inputs(experiment)
    padded = images.at[5:].set(1e6)
    batch = {inputs.key: np.asarray(padded), "mask": np.float32([1] * 5 + [0] * 3)}
    if tokens:
        batch["token_mask"] = np.float32(np.arange(8) < 6) * np.ones((8, 1), np.float32)
    monkeypatch.setattr(Inputs, "num_examples", 8)
    monkeypatch.setattr(Inputs, "split", lambda *args, **options: [batch])
    batches = inputs.calibration_batches()
    (seen,) = as_batches(batches, "calibrate")
    if tokens:
        np.testing.assert_array_equal(seen.mask, np.ones((5, 1)) * (np.arange(8) < 6))
        return
    rules = uniform_rules(8, 8)
    got = quantize.calibrate(model, variables, rules, batches)
    expected = quantize.calibrate(model, variables, rules, [images[:5]])
    jax.tree.map(np.testing.assert_array_equal, got, expected)
