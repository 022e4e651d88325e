"""What the advisor knows beside the records: methods, constraints and rules, with their sources.

Data only. Numbers are never in here: a rule says which measured arms answer a question, and what
may be said if one is better than the other. The records decide.
"""

import dataclasses
from collections.abc import Mapping

# An interval that contains 0 says "level" only if all of it is this close to 0: points of accuracy.
LEVEL = 1.0
# Arms tie if their paired interval contains 0 and their means are no further apart: points.
TIE = 0.5
# Fewer seeds than this make no claim between arms.
SEEDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a rule comes from."""

    papers: tuple[str, ...]  # arXiv ids
    results: tuple[str, ...] = ()  # files of docs/results in which this project measured it

    def __str__(self) -> str:
        papers = [f"arXiv:{paper}" for paper in self.papers]
        return "; ".join([*papers, *(f"docs/results/{file}" for file in self.results)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One of the answers that the advisor can give."""

    name: str
    says: str  # what one does
    arm: str  # code for it
    how: str = "Add to config.arms, fill in, and run launch/compress.py:"


# From the simplest on: what is sufficient and comes first here is recommended between equals.
# Seconds of training on a shared machine are noise beside these steps of effort.
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="labels only",
            says="take a float network that learned from labels, as it is",
            arm='arm(model="student", epochs=...)',
        ),
        Method(
            name="PTQ",
            says="calibrate a trained network, without training",
            arm='arm(model="student", init="student", bits="W8A8", reference="student")',
        ),
        Method(
            name="KD",
            says="train a smaller float network with the teacher",
            arm='arm(model="student", teacher="teacher", distill="kd", epochs=..., '
            'reference="student")',
        ),
        Method(
            name="KD then PTQ",
            says="distill in float, then calibrate",
            arm='arm(model="student", init="kd", bits="W8A8", reference="kd")',
        ),
        Method(
            name="QAT",
            says="train the quantized network with labels",
            arm='arm(model="student", init="student", bits="W4A4", epochs=..., '
            'reference="student")',
        ),
        Method(
            name="QAD",
            says="train the quantized network with the teacher",
            arm='arm(model="student", init="student", bits="W4A4", teacher="teacher", '
            'distill="kd", epochs=..., reference="qat_w4a4")',
        ),
        Method(
            name="mixed precision",
            says="give each layer its own bits",
            arm="python launch/search.py --config=CONFIG --workdir=WORKDIR "
            "--config.search.most.average_bits=3",
            how="A search finds them, whose config.search names students, a teacher and an arm to "
            "train as (configs/search_digits.py):",
        ),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirement:
    """One kind of constraint, and what is said of arms that fail it or can't be judged by it."""

    name: str
    unit: str  # "" where it is no number
    fails: str  # of an arm, after its name
    unknown: str  # what the records lack
    rerun: bool = False  # whether running the experiment gives it
    measure: str = ""  # the flags for that


REQUIREMENTS: Mapping[str, Requirement] = {
    one.name: one
    for one in (
        Requirement(
            name="size",
            unit="KiB",
            fails="its file is too large",
            unknown="no size of a file",
        ),
        Requirement(
            name="latency",
            unit="ms",
            fails="it is too slow in every format that was timed",
            unknown="no exported file was timed at this batch size",
            rerun=True,
            measure="--config.export.formats=onnx --config.export.latency_batches={batch}",
        ),
        Requirement(
            name="energy",
            unit="µJ, modelled",
            fails="its modelled energy is too high",
            unknown="records of an earlier version, without modelled energy: run anew in a new "
            "workdir",
            rerun=True,
        ),
        Requirement(
            name="accuracy",
            unit="%",
            fails="its accuracy is too low on validation",
            unknown="no validation accuracy",
        ),
        Requirement(
            name="drop",
            unit="points",
            fails="it loses too much to the teacher on validation",
            unknown="no teacher with the same seeds in the same experiment; use min_accuracy",
        ),
        Requirement(
            name="integers",
            unit="",
            fails="it needs integers that the device does not have",
            unknown="the name of its bits does not say which integers it has",
        ),
        Requirement(
            name="training",
            unit="minutes",
            fails="it trains for too long",
            unknown="no training time",
        ),
        Requirement(
            name="labels",
            unit="",
            fails="it is trained with labels, or starts from what is",
            unknown="a record does not say whether a taught arm also learned from labels: give its "
            "folder with --workdirs",
        ),
        Requirement(
            name="teacher",
            unit="",
            fails="it needs the teacher",
            unknown="",
        ),
    )
}

# The bits that a device multiplies or unpacks, by what --integers says of it.
INTEGERS: Mapping[str, frozenset[int]] = {
    "none": frozenset(),  # floats only
    "8": frozenset({8}),
    "sub8": frozenset(range(1, 9)),  # packed weights of fewer bits, too
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A question that a difference between two methods answers; accuracy of `a` minus of `b`.

    The arms of a pair have equal bits and equal parameters unless said otherwise, are of one
    experiment, and are each the best of their method on validation; the difference is on test.
    """

    name: str
    question: str  # under which it is answered: "distill", "quantize" or "both"
    a: str  # a method
    b: str  # a method, or "start": the float arm that `a` starts from, "teacher", or "uniform"
    above: str  # said if all of the interval is above 0
    below: str  # if all of it is below 0
    level: str  # if it contains 0 and lies within LEVEL of it
    source: Source
    caution: str = ""  # what else differs between such arms


QUESTIONS = {
    "distill": "When to distill",
    "quantize": "When to quantize",
    "both": "When to do both",
}

RULES = (
    Rule(
        name="distilled against labels",
        question="distill",
        a="KD",
        b="labels only",
        above="Distill: the teacher is worth more than labels to the small float network",
        below="Don't distill: labels are worth more than the teacher to the small float network",
        level="Labels do: the teacher changes the small float network's accuracy by little",
        source=Source(
            papers=("1503.02531",), results=("digits.md", "fashion_mnist.md", "teacher_quality.md")
        ),
    ),
    Rule(
        name="distilled against the teacher",
        question="distill",
        a="KD",
        b="teacher",
        above="Replace the teacher: the small distilled network is above it",
        below="A smaller network has its price: the distilled one is below the teacher",
        level="Replace the teacher: the small distilled network is level with it",
        source=Source(papers=("1503.02531",), results=("digits.md", "teacher_quality.md")),
    ),
    Rule(
        name="calibrated against float",
        question="quantize",
        a="PTQ",
        b="start",
        above="Calibrate and stop: rounding even helps",
        below="Calibration alone costs accuracy",
        level="Calibrate and stop: what rounding costs is little",
        source=Source(papers=("2106.08295",), results=("ladder.md", "digits.md")),
    ),
    Rule(
        name="trained quantized against calibrated",
        question="quantize",
        a="QAT",
        b="PTQ",
        above="Train with quantizers: QAT is above PTQ",
        below="Don't train: QAT is below the best PTQ",
        level="Don't train: QAT is level with the best PTQ",
        source=Source(papers=("1902.08153", "2106.08295"), results=("ladder.md", "digits.md")),
        caution="QAT also trains for longer: compare a float network trained as long",
    ),
    Rule(
        name="bits by layer against uniform",
        question="quantize",
        a="mixed precision",
        b="uniform",
        above="Mix: bits by layer are above equal bits in a file of about the same size",
        below="Don't mix: equal bits are above bits by layer in a file of about the same size",
        level="Don't mix: bits by layer are level with equal bits in a file of about the same size",
        source=Source(papers=("1811.08886", "1911.03852"), results=("search_fashion.md",)),
    ),
    Rule(
        name="calibrated after distilling against float",
        question="both",
        a="KD then PTQ",
        b="start",
        above="Distill, then calibrate: rounding the distilled network even helps",
        below="Distill and calibrate costs accuracy against the distilled float network",
        level="Distill, then calibrate: what rounding the distilled network costs is little",
        source=Source(papers=("1711.05852", "2106.08295"), results=("digits.md",)),
    ),
    Rule(
        name="distilled before calibrating or not",
        question="both",
        a="KD then PTQ",
        b="PTQ",
        above="Distill before calibrating: what the teacher gave survives rounding",
        below="Don't distill before calibrating: the network trained on labels rounds better",
        level="Distilling before calibrating changes little",
        source=Source(papers=("1711.05852",), results=("digits.md",)),
    ),
    Rule(
        name="teacher in quantized training",
        question="both",
        a="QAD",
        b="QAT",
        above="Do both at once: with the teacher, quantized training is above that with labels",
        below="Leave the teacher out: with it, quantized training is below that with labels",
        level="The teacher changes little in quantized training",
        source=Source(
            papers=("1711.05852", "1911.12491"),
            results=("digits.md", "kd_under_quantization.md", "ladder.md"),
        ),
    ),
    Rule(
        name="both at once or one after the other",
        question="both",
        a="QAD",
        b="KD then PTQ",
        above="Both at once: QAD is above distilling first and calibrating then",
        below="One after the other: distilling first and calibrating then is above QAD",
        level="One after the other will do: QAD is level with distilling and calibrating",
        source=Source(papers=("1911.12491",), results=("digits.md",)),
        caution="QAD also trains for longer",
    ),
)
