"""LiteRT files in LiteRT against the integer models that they are of."""

import numpy as np
import pytest
from networks import lowered, network

from kdq import deploy, quantize
from kdq.deploy import litert

pytest.importorskip("litert_converter")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")


DEFAULT = [("mlp", (2, 8))]
CASES = [
    pytest.param(name, bits, marks=() if (name, bits) in DEFAULT else pytest.mark.slow)
    for name in ("mlp", "pooled", "resnet", "vit")
    for bits in [(8, 8), (4, 4), (2, 8)]
]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_does_as_the_integer_model(name, bits):
    model, variables, images = network(name, offsets=0.5)
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(*bits), [images])
    integer = deploy.lower(model, variables, qparams, images)
    data = litert.to_litert(integer, images)
    outputs = litert.litert_model(data)(np.asarray(images))
    expected = np.asarray(integer(images))
    # Multipliers are fixed-point numbers there: some codes are the next one.
    assert np.abs(outputs - expected).max() < 0.05 * np.abs(expected).max()
    assert np.isclose(outputs, expected, atol=1e-5).mean() > 0.3
    assert (outputs.argmax(-1) == expected.argmax(-1)).mean() > 0.95
    # Every layer is an integer operator: of floats there are inputs, outputs and what is between.
    weights = [
        d for d in interpreter.Interpreter(model_content=data).get_tensor_details()
        if d["quantization_parameters"]["scales"].size and d["dtype"] == np.int8
    ]  # fmt: skip
    assert len(weights) >= len(qparams)


def test_weights_that_it_has_no_type_for_are_an_error():
    model, variables, images = network("mlp")
    spec = quantize.TensorSpec(bits=8, symmetric=False)
    rules = (
        quantize.QuantizationRule(path=".*", weights=spec, activations=quantize.TensorSpec(bits=8)),
    )
    integer, _ = lowered(model, variables, images, rules)
    with pytest.raises(ValueError, match="around 0"):
        litert.to_litert(integer, images)
