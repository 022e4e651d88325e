"""The fields of a config: frozen dataclasses, a comment and the limits at each field."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from kdq.fields import field, limits_of

SEEDS = 2**32  # random keys are made of 32 bits
# What a workdir has beside the arms; names without a dot.
FOLDERS = ("compiled", "costs", "plots", "runs", "searches")
HOT, COLD = 1000, 0.001  # temperatures: beyond these, softmax is uniform, or one class
HEAVIEST = 10**6  # weight of a loss
CLASSIFICATION = "classification"  # the task of a config that names none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which examples, and what is done to them."""

    # A TFDS image-classification data set, or an .npz file (kdq.data.save_arrays).
    name: str = field(some=True, path=True)
    # Where TFDS keeps it; "" is TFDS's own default. Of a file its folder.
    data_dir: str = field("", path=True)
    train: str = "train"  # TFDS split expressions; of a file the names of its splits
    validation: str = "validation"  # every choice is made on this one
    test: str = "test"  # measured once, at the end
    batch_size: int = field(64, at_least=1, at_most=2**31 - 1)
    eval_batch_size: int = field(512, at_least=1, at_most=2**31 - 1)
    augment: tuple[Mapping[str, Any], ...] = ()  # e.g. ({"name": "shift", "pixels": 2},)
    # Pixels become (pixel - mean) / std; a number, or one a channel.
    mean: float | tuple[float, ...] = field(0.0, some=True)
    std: float | tuple[float, ...] = field(255.0, at_least=1e-20, some=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Shared by every arm; an arm's own `learning_rate` is its peak. Cosine decay to zero."""

    name: str = "adam"
    warmup: float = field(0.05, at_least=0, at_most=1)  # share of steps: rises linearly from 0
    # What of the quantizers trains does so at this multiple of the rate.
    scale_rate: float = field(0.1, at_least=0, at_most=10**6)
    # "adam": relative steps of their scales; "sgd": absolute ones, with the gradient as it is.
    scale_rule: str = "adam"
    # Decoupled, on weights of two or more dimensions.
    weight_decay: float = field(0.0, at_least=0, at_most=10**6)
    clip_norm: float = field(0.0, at_least=0)  # global gradient norm; 0 is no clipping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """The arithmetic of a training step, and what is kept for its backward pass."""

    # Of the arithmetic of all models; "" is what `models` say.
    dtype: str = field("", one_of=("", "float32", "bfloat16", "float16"))
    # Parts that a batch is cut into, one after another, where it does not fit in memory: gradients
    # are averaged. Batch norm, and losses that compare examples, see one part at a time.
    accumulate: int = field(1, at_least=1)
    # Path pattern of modules whose activations are computed again for the backward pass instead of
    # kept, "stage_.*_block_.*"; "" is none.
    remat: str = field("", pattern=True)


AT_ONCE = Compute()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices that train together; numbers do not depend on them but for rounding.

    A batch is cut into data · fsdp parts; large arrays into fsdp · tensor.
    """

    # Devices; -1 here, or in one of the next two: all that are left.
    data: int = field(1, at_least=-1)
    fsdp: int = field(1, at_least=-1)
    tensor: int = field(1, at_least=-1)
    # ({"path": pattern, "axes": (None, "tensor")}, ...): how arrays of the state whose path holds
    # the pattern, and that have as many dimensions, are cut. Others: the last dimension by tensor,
    # the largest other one by fsdp, where they divide it.
    rules: tuple[Mapping[str, Any], ...] = ()
    least: int = field(16384, at_least=0)  # arrays of fewer elements stay whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Shared by every quantized arm; an arm's own `bits` apply to the layers not kept."""

    # Path patterns of the layers at `keep_bits`: the first, the last.
    keep: tuple[str, ...] = field((), pattern=True)
    keep_bits: int = field(8, at_least=1, at_most=8)
    calibration_examples: int = field(512, at_least=1)  # the first of the training split
    # Scales train (learned step sizes) but for those whose "LAYER/weights" or "LAYER/activations"
    # matches one of these patterns, which stay as calibrated; (".*",) trains none.
    fixed_scales: tuple[str, ...] = field((), pattern=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qat:
    """A way to train with quantizers; arms choose one by its key in `qat`.

    What may be a schedule is a number or one of kdq.distill.schedule, over the share of training.
    """

    method: str = "lsq"  # a key of kdq.quantize.qat.METHODS
    # Quantizers have at least so many bits: 16 and then 0 delays quantization, 8, 4 and then 0
    # narrows it by stages. 0 is their own.
    least_bits: float | Mapping[str, Any] = field(0.0, at_least=0, at_most=32)
    # Weight of Σ (rounded - weight)², against oscillation.
    dampen: float | Mapping[str, Any] = field(0.0, at_least=0, at_most=HEAVIEST)
    # Oscillations a step above which a weight is frozen.
    freeze: float | Mapping[str, Any] = field(0.0, at_least=0, at_most=1)
    track_oscillations: bool = False  # report how many weights oscillate; `freeze` does so anyway
    # Share of the steps after which batch norm keeps its statistics.
    freeze_norm: float = field(1.0, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """A way to learn from a teacher; arms choose one by its key in `distill`."""

    # Weight of the task's loss, with the labels: a number, or a schedule (kdq.distill.schedule).
    task: float | Mapping[str, Any] = field(0.1, at_least=0, at_most=HEAVIEST)
    # {name: {"loss": one of METHODS or of the task's own, "weight": number or schedule, options}}
    terms: Mapping[str, Mapping[str, Any]] = field(some=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One cell of the experiment. All arms go the same way: start, calibrate, train, measure."""

    model: str = field(refers=("models",))
    # Arm whose selected weights this one starts from; "" is fresh weights.
    init: str = field("", refers=("arms",))
    load: str = field("", path=True)  # or a packed file: a network that was trained elsewhere
    # Arm that teaches, or a key of `teachers`; "" is labels only. With `ptq` and no epochs, the arm
    # that guides a method that asks a teacher; "" is the float model itself.
    teacher: str = field("", refers=("arms", "teachers"))
    distill: str = field("", refers=("distill",), needs=("epochs",))  # how; only with a teacher
    # "W4A4", "W4" (weights only), a key of `rules` or of `searches`, or "" for float.
    bits: str = ""
    observer: str = "mse"  # calibration: absmax, min_max, moving_average, percentile, mse, entropy
    ptq: str = field("", refers=("ptq",), needs=("bits",))  # done beside calibration; "" is nothing
    qat: str = field("", refers=("qat",), needs=("bits", "epochs"))  # "": learned step sizes
    epochs: float = field(0.0, at_least=0)  # passes over the training split; 0 only calibrates
    stop: float = field(0.0, at_least=0)  # after so many, the schedules unfinished; 0: at the end
    # Their examples are kept from the arm's training.
    without_classes: tuple[int, ...] = field((), at_least=0, distinct=True, needs=("epochs",))
    learning_rate: float = field(1e-3, above=0)  # peak
    # Of the task loss: this much of the target spread evenly.
    label_smoothing: float = field(0.0, at_least=0, below=1, needs=("epochs",))
    seed_offset: int = 0  # added to the seed: an independent repetition of an equal arm
    augment: bool = True  # trains on images changed as `data.augment` says, if it says anything
    reference: str = field("", refers=("arms",))  # compared with in the table, seed by seed

    @property
    def kind(self) -> str:
        """The arm's kind, in the field's terms."""
        if self.bits:
            return "PTQ" if not self.epochs else "QAD" if self.teacher else "QAT"
        return "KD" if self.teacher else "labels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """A teacher's outputs on the training split; an arm that needs more runs it live.

    More is: features of its layers, or a teacher that changes with the student.
    """

    # "none": it runs at every step. "memory": logits, computed once a process; needs training
    # without augmentation. On disk, under the teacher's folder: "dense" logits, the "top_k" classes
    # or "sampled" ones; with augmentation a record for each position of the training stream.
    kind: str = field("memory", one_of=("none", "memory", "dense", "top_k", "sampled"))
    size: int = field(0, at_least=0)  # classes that top_k keeps, draws of sampled
    temperature: float = field(1.0, at_least=COLD, at_most=HOT)  # that these are made for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """Measures of what an arm took over from the teacher beside its predictions on test data."""

    examples: int = field(0, at_least=0)  # the first of the test split; 0 leaves these out
    pairs: int = field(256, at_least=1)  # of two classes: agreement on the path between them
    epsilon: float = field(0.1, at_least=0, at_most=1000)  # of an adversarial step, normalized


FORMATS = ("packed", "onnx", "onnx_int8", "litert", "stablehlo")  # see kdq.deploy.FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Files of every arm beside its packed one, in WORKDIR/ARM/SEED/export."""

    formats: tuple[str, ...] = ()  # keys of kdq.deploy.FORMATS
    arms: tuple[str, ...] = field((), refers=("arms",))  # only these; () is all
    # The first of the validation split, on which a file is compared.
    examples: int = field(1000, at_least=1)
    agreement: float = field(0.99, at_least=0, at_most=1)  # least, with the simulated model
    # Batch sizes at which each format is timed, beside the float model in ONNX Runtime; () is none.
    latency_batches: tuple[int, ...] = field((), at_least=1)
    threads: int = field(0, at_least=0)  # of each runtime when it is timed; 0 is one a core
    # Sums are multiplied by fixed-point numbers, as by microcontrollers; ONNX has no form for that.
    fixed_point: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources that a run of a sweep (launch/sweep.py) asks its executor for; 0 is unstated.

    They decide where a run runs, never its numbers.
    """

    cpus: int = field(0, at_least=0)  # cores
    gpus: int = field(0, at_least=0)
    memory_gib: float = field(0.0, at_least=0)  # main memory, GiB
    minutes: int = field(0, at_least=0)  # longest time; Slurm needs it, others do not limit it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgets:
    """Limits of costs, all of which hold; 0 is none."""

    average_bits: float = field(0.0, at_least=0)  # bits of a weight, mean over all weights
    size: float = field(0.0, at_least=0)  # bytes of the packed file
    weight_memory: float = field(0.0, at_least=0)  # bytes of parameters, weights in their bits
    activation_memory: float = field(0.0, at_least=0)  # bytes of a layer's input and output, most
    bops: float = field(0.0, at_least=0)  # bit operations for one example (arXiv:2005.07093)
    energy: float = field(0.0, at_least=0)  # nJ for one example, modelled (deploy.measure.energy)
    latency: float = field(0.0, at_least=0)  # ms for a batch in a runtime, measured

    @property
    def set(self) -> dict[str, float]:
        """Those that there are."""
        return {metric: limit for metric, limit in vars(self).items() if limit}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A choice of bits for each layer under budgets; arms name one by its key in their `bits`.

    It sees the training split (to calibrate, and to finetune if it does) and the first examples of
    the validation split, by which policies are judged; never the test split.
    """

    method: str = "knapsack"  # a key of kdq.search.METHODS
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of that method
    # Float arms whose weights may be quantized; of several, a policy names one: widths are searched
    # too. Arms with these bits have one of them as their `init`, and get what the policy names.
    students: tuple[str, ...] = field((), distinct=True, refers=("arms",))
    # Arm that guides: what policies do to the student is measured against it.
    teacher: str = field("", refers=("arms",))
    # Of a layer; "" is float.
    choices: tuple[str, ...] = field(
        ("W2A8", "W3A8", "W4A8", "W6A8", "W8A8"), some=True, distinct=True
    )
    # {path pattern: bits} of layers that are not searched; the first that matches a layer wins.
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    most: Budgets = Budgets()  # at most so much
    # At most this share of what the costliest student costs with every layer at its last choice.
    share: Budgets = Budgets()
    objective: str = "kl"  # what policies are judged by: kl (to the teacher), loss, error or noise
    sensitivity: str = "kl"  # of each layer alone: one of kdq.search.sensitivity.MEASURES
    observer: str = "mse"  # calibration, see Arm
    examples: int = field(1000, at_least=1)  # the first of the validation split
    evaluations: int = field(200, at_least=1)  # of policies, those for sensitivities among them
    # Arm that the arms of `launch/search.py` are trained as, by whose recipe policies are finetuned
    # for `steps` before they are judged. 0 steps: calibration alone.
    finetune: str = field("", refers=("arms",))
    steps: int = field(0, at_least=0, below=2**31)
    distilled: tuple[str, ...] = ()  # terms of the recipe of `finetune` that a policy may leave out
    # That one call of the device evaluates; 0: 1 on a CPU, else 16.
    policies_at_once: int = field(0, at_least=0)
    runtime: str = "onnx"  # where latencies are measured, a key of kdq.deploy.FORMATS
    batch: int = field(1, at_least=1)  # examples at once in it
    threads: int = field(1, at_least=1)
    # Whose files are measured before one is chosen, if size or latency counts.
    finalists: int = field(5, at_least=1)
    # Files of launch/cost_table.py; what they do not have is measured here, if a budget asks.
    cost_tables: tuple[str, ...] = field((), path=True)
    other_device: bool = False  # allows tables that were measured on another device


class Teacher:
    """A teacher that is no arm of the experiment."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that have to be there."""
        names = []
        for key, value in vars(self).items():
            if "arms" in limits_of(type(self), key).refers:
                names += [value] if isinstance(value, str) else value
        return tuple(filter(None, names))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble(Teacher):
    """Teachers that are averaged."""

    kind: str = "ensemble"
    arms: tuple[str, ...] = field(some=True, refers=("arms",))
    weights: tuple[float, ...] = field((), above=0)  # one an arm; () is equal ones
    average: str = field("probability", one_of=("probability", "logit"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingAverage(Teacher):
    """The exponential moving average of the student itself."""

    kind: str = "moving_average"
    decay: float = field(0.999, at_least=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer(Teacher):
    """A network trained at once, that learns from the student in turn."""

    kind: str = "peer"
    model: str = field(refers=("models",))
    # Float arm whose selected weights it starts from; "" is fresh weights.
    init: str = field("", refers=("arms",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormerPeer(Teacher):
    """The peer of an arm, as it was at the step that the arm selected; it learns no more."""

    kind: str = "former_peer"
    arm: str = field(refers=("arms",))  # one whose teacher is a peer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(Teacher):
    """A model in a packed file."""

    kind: str = "packed"
    path: str = field(some=True, path=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shuffled(Teacher):
    """A control: an arm's logits, each moved to another training example."""

    kind: str = "shuffled"
    arm: str = field(refers=("arms",))
    within_class: bool = True  # to one of the same label: the class is taught, the example is not


TeacherConfig = Ensemble | MovingAverage | Peer | FormerPeer | Packed | Shuffled
TEACHERS = {cls.kind: cls for cls in typing.get_args(TeacherConfig)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A set of arms over the same data, splits and seeds."""

    seeds: tuple[int, ...] = field(at_least=0, below=SEEDS, some=True, distinct=True)
    seeds_at_once: int = field(1, at_least=1)  # that train as one program, over all devices
    # Processes that launchers run arms in, each with its share of this machine's cores: 0 is one a
    # seed on CPUs as far as there are cores, where nothing is timed. See kdq.experiment.parallel.
    workers: int = field(0, at_least=0)
    data: Data
    # {"name": module of kdq.tasks, **its fields}.
    task: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": CLASSIFICATION})
    # {key: {"name": module of kdq.models, or "package.module:Class" of your own, **fields}}
    models: Mapping[str, Mapping[str, Any]] = field(some=True)
    arms: Mapping[str, Arm] = field(some=True, folders=FOLDERS)  # in the order of the table
    # Arm that fidelity and sizes are measured against.
    teacher: str = field("teacher", refers=("arms",))
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    quantize: Quantize = Quantize()
    # What no "W4A4" can say, formats, groups, dynamic ranges: {name: ({"path": pattern, "weights":
    # fields of kdq.quantize.TensorSpec, "activations": the same}, ...)}; the first that matches a
    # layer wins, before `quantize.keep`. Observers by name; the arm's, where none is given.
    rules: Mapping[str, tuple[Mapping[str, Any], ...]] = dataclasses.field(default_factory=dict)
    # Chains of post-training methods: {key: ({"method": one of kdq.quantize.ptq, options}, ...)}.
    ptq: Mapping[str, tuple[Mapping[str, Any], ...]] = dataclasses.field(default_factory=dict)
    qat: Mapping[str, Qat] = dataclasses.field(default_factory=dict)
    distill: Mapping[str, Distill] = dataclasses.field(default_factory=dict)
    # Bits by search: an arm whose `bits` is a key of these gets what is found with its seed.
    searches: Mapping[str, Search] = field(default_factory=dict, folders=())
    search: Search = Search()  # what launch/search.py does, beside these
    # Teachers that are no arm: {key: {"kind": a key of TEACHERS, **its fields}}.
    teachers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: Cache = Cache()
    transfer: Transfer = Transfer()
    export: Export = Export()
    resources: Resources = Resources()  # what a run of a sweep asks for
    evaluations: int = field(20, at_least=1)  # times that an arm is validated while it trains
    checkpoint_seconds: float = field(30.0, at_least=0)  # between two; 0 is every validation
    # A trial of a config, whose numbers mean nothing: records, tables and pages say so.
    quick: bool = False
