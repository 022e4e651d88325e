"""Exports: files that do what was simulated, and nothing of those that do not."""

import dataclasses
import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, network

from kdq import deploy, files, quantize, schema, tasks
from kdq.deploy import ParityError, export, load_packed, load_stablehlo
from kdq.deploy.formats import container
from kdq.deploy.formats.runtime import Runtime
from kdq.deploy.measure import parity
from kdq.quantize.network import Weights


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """`(packed file, images)` of a network of 2-bit weights."""
    model, variables, images = network("pooled", offsets=0.5)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(2, 8), [images], check=False
    )
    variables = deploy.lower(
        model, Weights(variables=variables, qparams=qparams), images
    ).simulated(variables)
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    description = {**NETWORKS["pooled"], "num_classes": 10}
    deploy.save_packed(
        path,
        Weights(variables=variables, qparams=qparams),
        model=description,
        metadata={"arm": "qat"},
    )
    return path, np.asarray(images)


def test_the_manifest_is_true(packed, tmp_path):
    path, images = packed
    manifest = export(path, tmp_path / "new" / "out", ["packed", "stablehlo"], images)
    folder = tmp_path / "new" / "out"
    assert files.read_json(folder / "manifest.json") == json.loads(json.dumps(manifest))
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json", "model.safetensors", "model.stablehlo",
    }  # fmt: skip
    assert manifest["metadata"] == {"arm": "qat"}
    assert manifest["in_float"] == {}
    assert manifest["examples"] == len(images)
    assert manifest["simulation"]["max_code_difference"] <= 1
    assert manifest["simulation"]["codes_that_differ"] <= 0.005
    for entry in manifest["files"].values():
        data = (folder / entry["file"]).read_bytes()
        assert entry["size_bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["argmax_agreement"] == 1
    simulated = np.asarray(load_packed(path)(images))
    outputs = np.asarray(load_stablehlo(folder / "model.stablehlo")(images))
    found = manifest["files"]["stablehlo"]["max_logit_difference"]
    assert found == np.abs(outputs - simulated).max() < 1e-4
    assert manifest["files"]["packed"]["max_logit_difference"] == 0


@pytest.mark.slow
def test_files_of_other_formats_stay_until_the_model_changes(packed, tmp_path):
    path, images = packed
    first = export(path, tmp_path / "out", ["packed"], images)["files"]
    both = export(path, tmp_path / "out", ["stablehlo"], images)["files"]
    assert both["packed"] == first["packed"]
    other = tmp_path / "other.safetensors"
    loaded = load_packed(path)
    deploy.save_packed(
        other,
        Weights(variables=loaded.variables, qparams={}),
        model={**NETWORKS["pooled"], "num_classes": 10},
    )
    assert set(export(other, tmp_path / "out", ["stablehlo"], images)["files"]) == {"stablehlo"}


def test_a_file_is_compared_with_its_simulation_whoever_wrote_it(tmp_path):
    """Of one with biases as they were trained: the rounding of biases is no difference."""
    model, variables, images = network("pooled", offsets=0.5)
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(2, 8), [images], check=False
    )
    path, description = tmp_path / "packed", {**NETWORKS["pooled"], "num_classes": 10}
    deploy.save_packed(path, Weights(variables=variables, qparams=qparams), model=description)
    images = np.asarray(images)
    files = export(path, tmp_path / "out", ["stablehlo"], images)["files"]
    plain = np.asarray(load_packed(path)(images))
    outputs = np.asarray(load_stablehlo(tmp_path / "out" / "model.stablehlo")(images))
    assert np.abs(outputs - plain).max() > 10 * files["stablehlo"]["max_logit_difference"]
    assert files["stablehlo"]["max_logit_difference"] < 0.02 * np.abs(plain).max()


def test_another_class_is_an_error_and_leaves_no_file(packed, tmp_path, monkeypatch):
    path, images = packed
    export(path, tmp_path / "out", ["packed", "stablehlo"], images)

    def load(file, threads, model):
        runtime = deploy.FORMATS["stablehlo"].load(file, threads, model)
        return Runtime(lambda images: np.roll(runtime(images), 1, axis=-1))

    wrong = dataclasses.replace(deploy.FORMATS["stablehlo"], load=load)
    with monkeypatch.context() as patch:
        patch.setitem(deploy.FORMATS, "wrong", dataclasses.replace(wrong, file="wrong.bin"))
        with pytest.raises(
            ParityError, match=r"wrong\.bin: .* 0\.00% of 64 examples, expected 99\.00%"
        ):
            export(path, tmp_path / "out", ["wrong"], images)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json", "model.safetensors", "model.stablehlo",
    }  # fmt: skip


def test_a_folder_that_cannot_be_written(packed, tmp_path):
    path, images = packed
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        export(path, tmp_path / "file" / "out", ["packed"], images)


def test_the_formats_of_a_config_are_these():
    assert tuple(deploy.FORMATS) == schema.FORMATS


def test_an_unknown_format(packed, tmp_path):
    path, images = packed
    with pytest.raises(ValueError, match=r"unknown export format 'onx'.*'onnx'"):
        export(path, tmp_path / "out", ["packed", "onx"], images)
    assert not (tmp_path / "out").exists()


def test_a_program_runs_without_the_model_and_refuses_damage(packed, tmp_path):
    path, images = packed
    integer = load_packed(path).lower(images[:1])
    file = tmp_path / "model.stablehlo"
    size = deploy.save_stablehlo(file, integer, images[:1], metadata={"arm": "qat"})
    assert size == file.stat().st_size
    program = load_stablehlo(file)
    assert program.metadata == {"arm": "qat"}
    assert set(program.exported.platforms) == {"cpu", "cuda"}
    for count in (1, 7):
        np.testing.assert_array_equal(program(images[:count]), integer(images[:count]))
    stored = {a.dtype for a in program.arguments}
    assert np.dtype("int4") in stored  # 2 bits, which programs can't take
    data = file.read_bytes()
    for damaged in (data[:-5], data[:100], b"", data[:-9] + b"x" + data[-8:]):
        file.write_bytes(damaged)
        with pytest.raises(container.ContainerError, match=r"model\.stablehlo"):
            load_stablehlo(file)
    with pytest.raises(FileNotFoundError, match="gone"):
        load_stablehlo(tmp_path / "gone")


@pytest.mark.slow
def test_the_fastest_is_recommended_but_never_the_simulation(packed, tmp_path):
    pytest.importorskip("jax2onnx")
    path, images = packed
    formats, folder = ["packed", "onnx", "stablehlo"], tmp_path / "out"
    manifest = export(path, folder, formats, images, latency_batches=(2, 64), threads=1)
    assert files.read_json(folder / "manifest.json") == json.loads(json.dumps(manifest))
    timed = {name: entry["latency"] for name, entry in manifest["files"].items()}
    assert set(timed) == set(formats)
    for latency in timed.values():
        assert latency["2"]["milliseconds"] < latency["64"]["milliseconds"]
        low, high = latency["2"]["quartiles"]
        assert low <= latency["2"]["ratio"] <= high
        assert len(latency["conditions"]["cores"]) == 1
    loaded = load_packed(path)
    in_float = deploy.lower(loaded.network, Weights(variables=loaded.variables, qparams={}), images)
    size = deploy.save_onnx(tmp_path / "float.onnx", in_float, images)
    for entry in manifest["files"].values():
        assert entry["smaller_than_float"] == pytest.approx(size / entry["size_bytes"])
    best = max(("onnx", "stablehlo"), key=lambda name: timed[name]["2"]["ratio"])
    assert manifest["recommended"] == best


def test_more_threads_than_cores_are_refused_before_anything_is_written(packed, tmp_path):
    with pytest.raises(ValueError, match=r"threads=100000: this process has \d+ cores"):
        export(packed[0], tmp_path / "out", ["packed"], packed[1], threads=100_000)
    assert not (tmp_path / "out").exists()


def test_what_a_format_can_not_hold_is_one_error_and_keeps_no_other_from_being_written(
    packed, tmp_path
):
    pytest.importorskip("jax2onnx")
    folder = tmp_path / "out"
    with pytest.raises(deploy.ExportError, match=r"format 'onnx_int8': .* signed=True") as raised:
        export(packed[0], folder, ["onnx_int8", "packed"], packed[1])
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "model.safetensors"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"packed"}
    assert manifest["failed"] == {"onnx_int8": str(raised.value)}
    assert raised.value.manifest["files"] == manifest["files"]
    # It is about the last call.
    assert export(packed[0], folder, ["packed"], packed[1])["failed"] == {}


def test_two_formats_that_fail_are_one_line(packed, tmp_path, monkeypatch):
    def save(path, source):
        raise ValueError("no words for it")

    broken = dataclasses.replace(deploy.FORMATS["stablehlo"], save=save)
    monkeypatch.setitem(deploy.FORMATS, "first", broken)
    monkeypatch.setitem(deploy.FORMATS, "second", broken)
    expected = "format 'first': no words for it; format 'second': no words for it"
    with pytest.raises(deploy.ExportError, match=f"^{expected}$"):
        export(packed[0], tmp_path / "out", ["first", "packed", "second"], packed[1])
    assert (tmp_path / "out" / "model.safetensors").is_file()


class Detector(nn.Module):
    """Boxes and scores of an image and numbers about it."""

    @nn.compact
    def __call__(self, image, about, *, train=False):
        x = nn.relu(nn.Dense(6)(image.reshape(image.shape[0], -1)))
        x = jnp.concatenate([x, about], -1)
        return {"scores": nn.Dense(3)(x), "boxes": nn.Dense(8)(x).reshape(-1, 2, 4)}


def test_several_inputs_and_outputs_in_every_format(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    pytest.importorskip("litert_converter")
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    inputs, model = (draw(6, 4, 4, 2), draw(6, 3)), Detector()
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(8, 8), [inputs])
    variables = deploy.lower(
        model, Weights(variables=variables, qparams=qparams), inputs
    ).simulated(variables)
    path, folder = tmp_path / "detector", tmp_path / "out"
    data = {"mean": [1.0, 2.0], "std": [3.0, 4.0], "name": "shapes"}
    deploy.save_packed(
        path,
        Weights(variables=variables, qparams=qparams),
        model={"name": "mine"},
        metadata={"data": data},
    )
    formats = ["packed", "onnx", "litert", "stablehlo"]
    manifest = export(path, folder, formats, inputs, network=model, agreement=1.0)
    assert set(manifest["files"]) == {*formats}
    assert manifest["inputs"] == [
        {
            "shape": ["batch", 4, 4, 2],
            "dtype": "float32",
            "layout": "NHWC",
            "normalization": {"mean": [1.0, 2.0], "std": [3.0, 4.0]},
        },
        {"shape": ["batch", 3], "dtype": "float32"},
    ]
    assert manifest["outputs"] == [
        {"shape": ["batch", 2, 4], "dtype": "float32", "place": "['boxes']"},
        {"shape": ["batch", 3], "dtype": "float32", "place": "['scores']"},
    ]
    # What the manifest calls things is enough to run a file.
    simulated = quantize.predict(model, variables, qparams, inputs)
    entry = manifest["files"]["onnx"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [taken["name"] for taken in entry["inputs"]]
    made = session.run(
        [output["name"] for output in entry["outputs"]], dict(zip(names, inputs, strict=True))
    )
    for array, key, output in zip(made, ("boxes", "scores"), entry["outputs"], strict=True):
        np.testing.assert_allclose(array, simulated[key], atol=0.05)
        assert [*array.shape[1:]] == output["shape"][1:]
    for entry in (manifest["files"][form] for form in formats):
        assert entry["max_logit_difference"] < 0.05
    interpreter = manifest["files"]["litert"]
    assert [taken["shape"] for taken in interpreter["inputs"]] == [[1, 4, 4, 2], [1, 3]]
    assert {taken["dtype"] for taken in interpreter["inputs"]} == {"float32"}


class Scored(nn.Module):
    """A dict of inputs, another one by keyword, and a mode that has no default."""

    @nn.compact
    def __call__(self, parts, deterministic, *, scale):
        x = jnp.concatenate([parts["a"], parts["b"]], -1)
        x = nn.Dropout(0.5)(nn.relu(nn.Dense(6)(x)), deterministic=deterministic)
        return nn.Dense(3)(x) * scale


def test_a_network_of_several_inputs_that_takes_deterministic_needs_no_flags(tmp_path):
    pytest.importorskip("jax2onnx")
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    network = quantize.Network(Scored())
    inputs = quantize.Inputs({"a": draw(6, 4), "b": draw(6, 1)}, scale=draw(6, 3))
    variables = jax.jit(network.init)(jax.random.key(0), inputs)
    qparams = quantize.calibrate(network, variables, quantize.uniform_rules(8, 8), [inputs])
    path, folder = tmp_path / "scored", tmp_path / "out"
    weights = Weights(variables=variables, qparams=qparams)
    deploy.save_packed(path, weights, model={"name": "mine"})
    formats = ["packed", "onnx", "stablehlo"]
    manifest = export(path, folder, formats, inputs, network=Scored(), agreement=1.0)
    assert set(manifest["files"]) == {*formats}
    assert [entry["shape"][1] for entry in manifest["inputs"]] == [4, 1, 3]
    assert manifest["files"]["onnx"]["max_code_difference"] == 0
    simulated = quantize.predict(network, variables, qparams, inputs)
    outputs = load_stablehlo(folder / "model.stablehlo")(*jax.tree.leaves(inputs))
    np.testing.assert_allclose(outputs, simulated, atol=0.02 * np.abs(simulated).max())


def test_codes_that_differ_are_counted():
    ours = {"a": np.uint8([[0, 1], [2, 255]]), "b": np.int32([5, 5, 5, 5]), "c": np.uint8([9])}
    theirs = {"a": np.int32([[0, 1], [4, 254]]), "b": np.int32([5, 5, 5, 9]), "d": np.uint8([1])}
    assert parity.compare_integers(ours, theirs) == {
        "max_code_difference": 2,
        "max_sum_difference": 4,
        "codes_that_differ": 2 / 4,
        "layers_that_differ": {"a": 0.5, "b": 0.25},
    }


def test_codes_of_the_simulation_by_hand(tmp_path):
    """One layer, of which the codes of two calls are known."""
    model, variables, images = network("mlp")
    qparams = quantize.calibrate(
        model, variables, quantize.uniform_rules(8, 8), [images], check=False
    )
    path = tmp_path / "model.safetensors"
    deploy.save_packed(
        path,
        Weights(variables=variables, qparams=qparams),
        model={**NETWORKS["mlp"], "num_classes": 10},
    )
    packed = load_packed(path)
    integer = packed.lower(images)
    codes = parity.simulated_codes(packed, integer, images)
    assert set(codes) == {name for name in parity.layer_integers(integer, images) if "/" in name}
    name = next(name for name in codes if codes[name].shape[-1] == 64)  # of the pixels
    scale = np.float32(qparams[name.split("/")[0]]["activations"].scale)
    steps = np.round(np.asarray(images).reshape(len(images), -1) / scale)
    np.testing.assert_array_equal(codes[name], np.clip(steps, -128, 127) + 128)
    # Codes that are off by one are found.
    off = {**codes, name: np.asarray(codes[name]) ^ 1}
    found = parity.compare_integers(off, parity.layer_integers(integer, images))
    assert found["max_code_difference"] == 1
    assert found["max_sum_difference"] == 0
    assert found["codes_that_differ"] > 0.1


@pytest.mark.parametrize(
    ("name", "agreement"), [("classification", 2 / 3), ("multilabel", 5 / 6), ("regression", None)]
)
def test_outputs_agree_in_the_terms_of_their_task(name, agreement):
    expected = np.array([[1.0, -1.0], [2.0, 1.0], [-3.0, 0.5]], np.float32)
    outputs = np.array([[0.5, -2.0], [1.0, 1.5], [-3.0, -0.5]], np.float32)
    if agreement is None:
        agreement = 1 - np.linalg.norm(outputs - expected) / np.linalg.norm(expected)
    task = tasks.build(name)
    found = parity.compare_outputs(outputs, expected, task)
    assert found["argmax_agreement"] == pytest.approx(agreement)
    assert found["max_logit_difference"] == 1.0
    zeros = np.zeros_like(expected)
    assert parity.compare_outputs(zeros, zeros, task)["argmax_agreement"] == 1


def test_an_export_of_regression_says_what_its_outputs_are(packed, tmp_path):
    path, images = packed
    mean, std = (2.0,) * 10, (0.5,) * 10
    task = tasks.build("regression", mean=mean, std=std, unit="mg/dl")
    manifest = export(path, tmp_path, ["stablehlo"], images, task=task)
    assert files.read_json(tmp_path / "manifest.json")["prediction"] == {
        "task": "regression",
        "meaning": "standardized targets",
        "mean": list(mean),
        "std": list(std),
        "unit": "mg/dl",
    }
    assert 0.99 < manifest["files"]["stablehlo"]["argmax_agreement"] <= 1
    with pytest.raises(ParityError, match="agrees with the simulated model"):
        export(path, tmp_path, ["stablehlo"], images, task=task, agreement=1.1)
