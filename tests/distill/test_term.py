"""Terms: from a config entry to a weighted loss, with adapters and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.distill import features, losses, methods, term
from kdq.distill.capture import Outputs
from kdq.fields import ConfigError

RNG = np.random.default_rng(0)
B, C = 6, 5
KEY = jax.random.key(1)


def _shapes(**layers):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in layers.items()}


STUDENT = _shapes(maps=(B, 4, 4, 3), vector=(B, 7), query=(B, 5, 2, 4), key=(B, 5, 2, 4))
TEACHER = _shapes(
    maps=(B, 2, 2, 8), same=(B, 4, 4, 9), vector=(B, 6), query=(B, 5, 2, 6), key=(B, 5, 2, 6)
)


def _outputs(shapes, seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    return Outputs(
        logits=draw((B, C)), features={name: draw(s.shape) for name, s in shapes.items()}
    )


BATCH = {
    "label": np.arange(B, dtype=np.int32) % C,
    "id": np.arange(B, dtype=np.int32) * 3,
    "mask": np.float32([1, 1, 0, 1, 1, 1]),
    "teacher_indices": np.tile(np.int32([0, 2, 4]), (B, 1)),
    "teacher_log_probs": np.log(np.tile(np.float32([0.5, 0.2, 0.2]), (B, 1))),
    "teacher_weights": np.tile(np.float32([0.5, 0.3, 0.2]), (B, 1)),
}
ENTRIES = {
    name: {} if not methods.METHODS[name].layers else {"student": "maps", "teacher": "same"}
    for name in methods.METHODS
}
ENTRIES["dkd"] = {"alpha": 2.0, "beta": 4.0, "temperature": 3.0}
ENTRIES["top_k_kl"] = ENTRIES["sampled_kl"] = {"temperature": 2.0}
ENTRIES["hint"] = {"student": "maps", "teacher": "maps"}  # half the side: a strided adapter
ENTRIES["contrastive"] = {"student": "maps", "teacher": "vector", "negatives": 4, "dim": 8}
ENTRIES["info_nce"] = {"student": "vector", "teacher": "vector", "dim": 8}
ENTRIES["hidden_states"] = {"student": "vector", "teacher": "vector"}
ENTRIES["attention_relation"] = {"student": ("query", "key"), "teacher": ("query", "key")}
ENTRIES["hidden_states"] = {"student": "tokens", "teacher": "tokens"}
STUDENT["tokens"], TEACHER["tokens"] = _shapes(a=(B, 5, 3))["a"], _shapes(a=(B, 5, 4))["a"]


DEFAULT = ("kl", "dkd", "hint", "contrastive", "top_k_kl", "attention_relation")
EVERY = [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in methods.METHODS]


def _values(built, params, memory, student, teacher, batch, key=None):
    """`(values, memory)` of a term."""
    weights = jnp.asarray(batch.get("mask", np.ones(B, np.float32)))
    return built(params, memory, built.look(student, teacher, batch, weights), key)


@pytest.mark.parametrize("name", EVERY)
def test_every_method_teaches_from_a_config_entry(name):
    """A finite value, none of it from masked examples, and a gradient to the student alone."""
    one = term.build("mine", {"loss": name, **ENTRIES[name]}, "where")
    params, memory = one.init(jax.random.key(0), STUDENT, TEACHER, num_examples=20)
    student, teacher = _outputs(STUDENT, 1), _outputs(TEACHER, 2)

    @jax.jit
    def total(student, teacher, params):
        values, remembered = _values(one, params, memory, student, teacher, BATCH, KEY)
        return jnp.sum(values), (values, remembered)

    (_, (values, remembered)), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(
        student, teacher, params
    )
    assert values.shape == (B,)
    assert np.isfinite(values).all()
    assert values[2] == 0
    assert np.abs(np.delete(np.asarray(values), 2)).max() > 0
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0])) > 1e-6
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads[1]))
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads[2]):
        assert np.abs(gradient).max() > 0, path  # what is trained beside the student does train
    assert jax.tree.structure(remembered) == jax.tree.structure(memory)


def test_values_are_the_loss_of_the_adapted_feature():
    one = term.build("h", {"loss": "hint", "student": "maps", "teacher": "maps"}, "w")
    params, _ = one.init(jax.random.key(0), STUDENT, TEACHER, 1)
    student, teacher = _outputs(STUDENT, 1), _outputs(TEACHER, 2)
    values, _ = _values(one, params, {}, student, teacher, {})
    adapter = jax.tree.map(lambda x: np.asarray(x, np.float64), params["adapter"])
    adapted = student.features["maps"][:, ::2, ::2] @ adapter["kernel"] + adapter["bias"]
    expected = ((adapted - teacher.features["maps"]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_pooled_features_are_compared_by_their_means():
    entry = {"loss": "relational_distance", "student": "maps", "teacher": "same", "pool": True}
    one = term.build("r", entry, "w")
    student, teacher = _outputs(STUDENT, 1), _outputs(TEACHER, 2)
    values, _ = _values(one, {}, {}, student, teacher, {})
    means = [o.features[k].mean((1, 2)) for o, k in ((student, "maps"), (teacher, "same"))]
    np.testing.assert_allclose(values, features.relational_distance(*means), rtol=1e-5)
    hint = term.build("h", entry | {"loss": "hint", "teacher": "maps"}, "w")
    params, _ = hint.init(jax.random.key(0), STUDENT, TEACHER, 1)
    assert params["adapter"]["kernel"].shape == (3, 8)
    assert np.isfinite(_values(hint, params, {}, student, teacher, {})[0]).all()


def test_a_variance_starts_at_five_and_memory_at_unit_length():
    one = term.build(
        "v", {"loss": "variational_information", "student": "maps", "teacher": "same"}, "w"
    )
    params, _ = one.init(jax.random.key(0), STUDENT, TEACHER, 1)
    np.testing.assert_allclose(np.log1p(np.exp(params["raw_variance"])), 5.0, rtol=1e-5)
    one = term.build("c", {"loss": "contrastive", **ENTRIES["contrastive"]}, "w")
    _, memory = one.init(jax.random.key(0), STUDENT, TEACHER, 20)
    assert memory.student_bank.shape == (20, 8)
    np.testing.assert_allclose(np.linalg.norm(memory.teacher_bank, axis=1), 1, rtol=1e-5)


def test_numbers_are_data_and_the_rest_is_not():
    def build(**options):
        return term.build("t", {"loss": "kl", **options}, "w")

    student, teacher = _outputs(STUDENT, 1), _outputs(TEACHER, 2)
    call = jax.jit(lambda one: _values(one, {}, {}, student, teacher, {})[0])
    for temperature in (1.0, 4, 7.5):
        np.testing.assert_allclose(
            call(build(temperature=temperature, weight=temperature)),
            losses.kl(student.logits, teacher.logits, temperature),
            rtol=1e-5,
        )
    assert call._cache_size() == 1
    entry = {"loss": "relational_angle", "student": "maps", "teacher": "maps"}
    chunked = term.build("t", {**entry, "chunk": 2}, "w")
    assert dict(chunked.fixed) == {"chunk": 2}
    np.testing.assert_allclose(
        _values(chunked, {}, {}, student, teacher, {})[0],
        features.relational_angle(student.features["maps"], teacher.features["maps"]),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"loss": "k1"}, ["w.loss", "'k1'", "valid: kl, reverse_kl"]),
        ({}, ["w.loss", "None"]),
        ({"loss": "kl", "temprature": 2}, ["w (kl)", "'temperature'?"]),
        ({"loss": "kl", "temperature": "2"}, ["w (kl).temperature='2'", "want a number"]),
        ({"loss": "kl", "temperature": float("inf")}, ["finite"]),
        ({"loss": "kl", "weight": {"kind": "linaer"}}, ["w.weight.kind", "'linear'?"]),
        ({"loss": "kl", "pool": True}, ["w.pool=True", "layers (kl)"]),
        ({"loss": "kl", "student": "maps"}, ["w.student", "0 layers"]),
        ({"loss": "kl", "adapter": "conv"}, ["w.adapter (kl)", "valid: none"]),
        ({"loss": "hint", "student": "maps"}, ["w.teacher", "1 layers"]),
        (
            {"loss": "hint", "student": "maps", "teacher": "maps", "adapter": "convv"},
            ["w.adapter (hint)", "'conv'?", "none, linear"],
        ),
        ({"loss": "top_k_kl"}, ["w (top_k_kl) needs 'temperature'"]),
        (
            {"loss": "relational_angle", "student": "a", "teacher": "b", "chunk": 2.5},
            ["chunk=2.5", "int or NoneType"],
        ),
        ({"loss": "attention_relation", "student": "query"}, ["w.student", "2 layers"]),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(entry, words):
    with pytest.raises(ConfigError) as error:
        term.build("t", entry, "w")
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"


def _scaled(student, teacher, scale: "float" = 1.0, power=2, *, mask=None):
    return scale * jnp.abs(student - teacher).sum(-1) ** power


def test_annotations_of_a_loss_say_what_is_data_and_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "scaled", methods.OnLogits(loss=_scaled))
    with pytest.raises(ConfigError, match=r"does not annotate 'power'.*power: float"):
        term.build("t", {"loss": "scaled"}, "w")
    monkeypatch.setitem(_scaled.__annotations__, "power", int)
    built = term.build("t", {"loss": "scaled", "scale": 3}, "w")
    assert dict(built.options) == {"scale": 3.0}
    assert dict(built.fixed) == {"power": 2}


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ("map", "maps", ["layer of the student", "'maps'?", "vector"]),
        ("maps", "mapz", ["layer of the teacher", "'maps'?", "same"]),
        ("maps", "vector", ["student layer ('maps',)", "teacher layer ('vector',)", "(6, 6)"]),
    ],
)
def test_layers_that_are_not_there_or_do_not_fit_are_refused(student, teacher, words):
    one = term.build("t", {"loss": "hint", "student": student, "teacher": teacher}, "w")
    with pytest.raises(ConfigError) as error:
        one.init(jax.random.key(0), STUDENT, TEACHER, 1)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"
