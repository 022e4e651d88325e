"""Methods of distillation: losses with all they need besides two arrays.

Labels, layers, adapters, a memory. A method is one way to learn from a teacher. To add one, write
its loss as a pure function in `losses.py` or `features.py` and give it a line in `METHODS`.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdq.distill import adapters, contrast, features, losses, sparse
from kdq.distill.reduction import Count
from kdq.tasks.base import Task
from kdq.types import Array, Batch

Shape = tuple[int, ...]


class LossInputs(typing.NamedTuple):
    """The arrays of one batch that a method compares: logits, or the features of its layers."""

    student: tuple[Array, ...]
    teacher: tuple[Array, ...]
    batch: Batch
    weights: Array  # of the predictions, in the shape of a loss on logits; 0: it does not count
    mask: Array | None  # [batch], of the examples; None: all count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to learn from a teacher, by a loss of the arrays of `LossInputs`."""

    loss: Callable
    layers: int = 0  # that it captures of either model; 0: it works on the logits
    adapter: str = ""  # by default: a key of adapters.KINDS, or "" where it takes none
    reads: typing.ClassVar[tuple[str, ...]] = ()  # names in the batch, or "teacher_logits"
    arrays: typing.ClassVar[int] = 2  # arguments of the loss that no config sets
    extra_options: typing.ClassVar[Mapping[str, tuple[type, Any]]] = {}  # name -> type, default

    def options(self) -> Mapping[str, inspect.Parameter]:
        """Returns the parameters that a config may set: all but arrays, masks and reduction."""
        parameters = inspect.signature(self.loss, eval_str=True).parameters
        names = [n for n in parameters if n not in ("mask", "reduction", "token_mask")]
        extra = {
            name: inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
            for name, (kind, default) in self.extra_options.items()
        }
        return {name: parameters[name] for name in names[self.arrays :]} | extra

    def init(
        self, key: Array, student: tuple[Shape, ...], teacher: tuple[Shape, ...], **context: Any
    ) -> tuple[Any, Any]:
        """Returns `(params, memory)`: what trains beside the student, and what it remembers."""
        return {}, {}

    def __call__(
        self,
        params: Any,
        memory: Any,
        inputs: LossInputs,
        key: Array | None,
        options: Mapping[str, Any],
    ) -> tuple[Array, Any]:
        """Returns `(values, memory)`, masked values in the shape of the method's mask.

        That is `inputs.weights` for a method on logits, and `inputs.mask` for one on features.
        `key` is random, of this step and term.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnLogits(Method):
    """Student's and teacher's logits, and with `extra` what the batch holds under those names."""

    extra: tuple[str, ...] = ()
    needs_logits: bool = True  # of the teacher; False: `extra` has all that is known of it

    @property
    def arrays(self) -> int:
        return 1 + self.needs_logits + len(self.extra)

    @property
    def reads(self) -> tuple[str, ...]:
        return (*(("teacher_logits",) if self.needs_logits else ()), *self.extra)

    def __call__(self, params, memory, inputs, key, options):
        arrays = [*inputs.student, *(inputs.teacher if self.needs_logits else ())]
        arrays += [inputs.batch[name] for name in self.extra]
        return self.loss(*arrays, mask=inputs.weights, **options), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnOutputs(Method):
    """A loss of the task's own, on student's and teacher's outputs and the batch."""

    reads = ("teacher_logits",)
    arrays = 3

    def __call__(self, params, memory, inputs, key, options):
        values = self.loss(*inputs.student, *inputs.teacher, inputs.batch, **options)
        return inputs.weights * jnp.where(inputs.weights > 0, values, 0), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnFeatures(Method):
    """The features of one layer each, the student's by way of an adapter.

    A loss of tokens, one with `token_mask`, is told which are padding where the batch says so.
    """

    adapter: str = "none"
    layers: int = 1

    def init(self, key, student, teacher, *, adapter, **context):
        params = adapters.KINDS[adapter](key, student[0], teacher[0])
        return ({"adapter": params} if params else {}), {}

    def __call__(self, params, memory, inputs, key, options):
        (student,), (teacher,) = inputs.student, inputs.teacher
        student = adapters.adapt(params.get("adapter", {}), student, teacher.shape)
        further = [params["raw_variance"]] if "raw_variance" in params else []
        masks = {"mask": inputs.mask}
        if "token_mask" in inspect.signature(self.loss).parameters:
            masks["token_mask"] = inputs.batch.get("token_mask")
        return self.loss(student, teacher, *further, **masks, **options), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variational(OnFeatures):
    """A Gaussian around the adapted student, whose variance of each channel trains."""

    adapter: str = "fit"
    arrays = 3

    def init(self, key, student, teacher, **context):
        params, memory = super().init(key, student, teacher, **context)
        # softplus(x) = 5, where the authors start.
        raw = jnp.full(teacher[0][-1], jnp.log(jnp.expm1(5.0)), jnp.float32)
        return {**params, "raw_variance": raw}, memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded(Method):
    """Both features, averaged over positions, through linear maps to one space that train."""

    layers: int = 1
    extra_options = {"dim": (Count, 128)}  # noqa: RUF012 (read only)

    def init(self, key, student, teacher, *, options, **context):
        keys, dim = jax.random.split(key), options.get("dim", 128)
        shapes = zip(("student", "teacher"), keys, (*student, *teacher), strict=True)
        return {name: adapters.init_linear(k, (s[-1],), (dim,)) for name, k, s in shapes}, {}

    def embed(self, params, inputs):
        pairs = (("student", inputs.student[0]), ("teacher", inputs.teacher[0]))
        for name, feature in pairs:
            feature = feature.astype(jnp.float32)
            vector = feature.mean(tuple(range(1, feature.ndim - 1)))
            yield adapters.adapt(params[name], vector, vector.shape)

    def __call__(self, params, memory, inputs, key, options):
        options = {k: v for k, v in options.items() if k != "dim"}
        return self.loss(*self.embed(params, inputs), mask=inputs.mask, **options), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(Embedded):
    """Against negatives drawn from a memory of every example's embeddings."""

    arrays = 5
    extra_options = {"dim": (Count, 128), "negatives": (Count, 1024)}  # noqa: RUF012

    def init(self, key, student, teacher, *, options, num_examples, **context):
        heads, _ = super().init(key, student, teacher, options=options)
        key = jax.random.fold_in(key, 1)
        return heads, contrast.init_memory(key, num_examples, options.get("dim", 128))

    def __call__(self, params, memory, inputs, key, options):
        options = {k: v for k, v in options.items() if k != "dim"}
        ids, count = inputs.batch["id"], options.pop("negatives", 1024)
        negatives = contrast.draw_negatives(key, ids, len(memory.student_bank), count)
        embeddings = self.embed(params, inputs)
        return self.loss(*embeddings, memory, ids, negatives, mask=inputs.mask, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation(Method):
    """Two projections of an attention layer, [batch, tokens, heads, width] as Flax has them."""

    layers: int = 2
    arrays = 4

    def __call__(self, params, memory, inputs, key, options):
        arrays = [jnp.swapaxes(x, 1, 2) for x in (*inputs.student, *inputs.teacher)]
        tokens = inputs.batch.get("token_mask")
        return self.loss(*arrays, token_mask=tokens, mask=inputs.mask, **options), memory


METHODS: dict[str, Method] = {
    "kl": OnLogits(loss=losses.kl),
    "reverse_kl": OnLogits(loss=losses.reverse_kl),
    "jensen_shannon": OnLogits(loss=losses.jensen_shannon),
    "skew_kl": OnLogits(loss=losses.skew_kl),
    "dkd": OnLogits(loss=losses.dkd, extra=("label",)),
    "dist": OnLogits(loss=losses.dist),
    "standardized_kl": OnLogits(loss=losses.standardized_kl),
    "soft_mse": OnLogits(loss=losses.soft_mse),
    "hard_label": OnLogits(loss=losses.hard_label),
    "top_k_kl": OnLogits(
        loss=sparse.top_k_kl, extra=("teacher_indices", "teacher_log_probs"), needs_logits=False
    ),
    "sampled_kl": OnLogits(
        loss=sparse.sampled_kl, extra=("teacher_indices", "teacher_weights"), needs_logits=False
    ),
    "hint": OnFeatures(loss=features.hint, adapter="fit"),
    "attention_transfer": OnFeatures(loss=features.attention_transfer),
    "similarity_preserving": OnFeatures(loss=features.similarity_preserving),
    "relational_distance": OnFeatures(loss=features.relational_distance),
    "relational_angle": OnFeatures(loss=features.relational_angle),
    "variational_information": Variational(loss=features.variational_information),
    "quantized_feature": OnFeatures(loss=features.quantized_feature, adapter="fit"),
    "contrastive": Contrastive(loss=contrast.contrastive),
    "info_nce": Embedded(loss=contrast.info_nce),
    "attention_relation": Relation(loss=features.attention_relation),
    "hidden_states": OnFeatures(loss=features.hidden_states, adapter="fit"),
}


def list_methods(task: Task) -> dict[str, Method]:
    """Returns the methods that a task's terms may use, by name.

    Those of METHODS, without those on logits where outputs are no logits of classes, and the losses
    of the task's own.
    """
    shared = {name: m for name, m in METHODS.items() if m.layers or task.categorical}
    return shared | {name: OnOutputs(loss=loss) for name, loss in task.distillation.items()}
