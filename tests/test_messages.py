"""Messages of processes: values come back, and nothing that is named is run."""

import dataclasses
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import messages
from kdq.config import ConfigError
from kdq.experiment.searching import SearchResult
from kdq.quantize import grid
from kdq.quantize.network import Weights
from kdq.train.step import NonFiniteError

QUANTIZER = grid.Quantizer(
    scale=jnp.ones((1, 3)),
    zero_point=jnp.zeros((1, 3)),
    qmin=jnp.float32(-8),
    qmax=jnp.float32(7),
    dynamic=grid.Dynamic(granularity="per_token"),
    training=grid.Training(trains=("scale", "zero_point")),
)
VALUES = [
    None,
    True,
    [1, -(2**70), 0.1, "é\ud800", (), {}],
    {("arm", 0): {"accuracy": 0.5, "list": [1]}, ("arm", 1): None},
    (1e300, math.inf, -0.0),
    {"a": {"list": [1]}, "dict": 3},
    np.float64(0.1),
    SearchResult(name="s", chosen={"conv_0": "W4A8"}, observer="mse", description={"n": 3}),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_plain_values_come_back(value):
    there = messages.decode(messages.encode(value))
    assert there == value
    assert type(there) is type(value)


def test_arrays_come_back_to_the_bit():
    value = {
        "numpy": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2] + 2**40,
        "jax": jnp.asarray([1.5, -np.nan, 1e-40], jnp.float32),
        "half": jnp.asarray([1.5], jnp.bfloat16),
        "four": jnp.asarray([3, -8], jnp.int4),
        "scalar": jnp.zeros((), jnp.int32),
        "empty": np.zeros((0, 4), np.uint8),
        "key": jax.random.split(jax.random.key(3), 2),
    }
    there = messages.decode(messages.encode(value))
    assert there.keys() == value.keys()
    for name, array in value.items():
        assert (there[name].dtype, there[name].shape) == (array.dtype, array.shape)
        assert isinstance(there[name], jax.Array) == isinstance(array, jax.Array)
        bits = jax.random.key_data if name == "key" else np.asarray
        assert np.asarray(bits(there[name])).tobytes() == np.asarray(bits(array)).tobytes()


def test_weights_come_back_with_their_quantizers():
    weights = Weights(
        variables={"params": {"dense": {"kernel": jnp.ones((2, 3))}}},
        qparams={"dense": {"weights": QUANTIZER}},
    )
    there = messages.decode(messages.encode((weights, None, {"seconds": 1.5})))[0]
    assert type(there) is Weights
    assert jax.tree.structure(there.qparams) == jax.tree.structure(weights.qparams)
    jax.tree.map(np.testing.assert_array_equal, there.variables, weights.variables)
    jax.tree.map(np.testing.assert_array_equal, there.qparams, weights.qparams)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("config.x=1: expected 2"),
        NonFiniteError("loss"),
        ValueError("a", 3),
        KeyError("x"),
        OSError(28, "No space left on device", "/tmp/x"),
        FileNotFoundError("no file"),
    ],
    ids=repr,
)
def test_errors_come_back(error):
    there = messages.decode(messages.encode((None, error)))[1]
    assert type(there) is type(error)
    assert str(there) == str(error)


def test_an_error_of_elsewhere_is_said_by_name():
    there = messages.decode(messages.encode(json.JSONDecodeError("bad", "doc", 3)))
    assert type(there) is RuntimeError
    assert str(there).startswith("JSONDecodeError: bad")


@dataclasses.dataclass
class Mine:
    x: int


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, len, Mine(3), np.array([{}])],
    ids=lambda value: type(value).__name__,
)
def test_what_no_reader_should_build_is_not_sent(value):
    with pytest.raises(TypeError, match="can't be sent to another process"):
        messages.encode([value])


def crafted(document):
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "document",
    [
        {"class": ["os:system", {"dict": []}]},
        {"class": ["subprocess:Popen", {"dict": [["args", "true"]]}]},
        {"class": ["kdq.processes:os.system", {"dict": [["command", "true"]]}]},
        {"class": ["kdq.quantize.network:Weights", {"dict": [["nope", 1]]}]},
        {"class": ["kdq.nowhere:X", {"dict": []}]},
        {"object": []},
        {"array": ["numpy", "object", [1], 0]},
        {"array": ["numpy", "float32", [9], 0]},
        {"a": 1, "b": 2},
        {},
        {"tuple": 3},
    ],
    ids=str,
)
def test_crafted_messages_build_nothing(document):
    with pytest.raises(ValueError, match=r"."):
        messages.decode(crafted(document))


def test_an_error_class_is_an_error():
    for name in ("builtins:exec", "builtins:eval", "os:system", "kdq.processes:os.abort"):
        there = messages.decode(crafted({"error": [name, "text", {"list": ["1/0"]}]}))
        assert type(there) is RuntimeError


def test_a_pickle_is_no_message():
    with pytest.raises(ValueError, match=r"."):
        messages.decode(pickle.dumps({"a": 1}))
