"""The fields of a search of bits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kdq.fields import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgets:
    """Limits of costs, all of which hold; 0 is none."""

    average_bits: float = field(0.0, at_least=0)  # bits of a weight, mean over all weights
    size: float = field(0.0, at_least=0)  # bytes of the packed file
    # Bytes of the parameters, weights in their own bits.
    weight_memory: float = field(0.0, at_least=0)
    # Bytes of the input and output of the layer where they are most.
    activation_memory: float = field(0.0, at_least=0)
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
