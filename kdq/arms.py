"""The standard set of arms, for config files: distill, quantize, both, and their controls."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kdq.config import arm, search

CALIBRATED = ("W8A8", "W4A4", "W3A3", "W2A2")
TRAINED = ("W4A4", "W3A3", "W2A2")


def kl(alpha: float, temperature: float) -> dict[str, Any]:
    """The recipe `(1 - alpha) CE + alpha T² KL(teacher ‖ student)` for `config.distill`."""
    return recipe("kl", alpha, temperature=temperature)


def recipe(loss: str, alpha: float, **options: Any) -> dict[str, Any]:
    """The recipe `(1 - alpha) task's loss + alpha loss` for `config.distill`.

    Args:
      loss: a key of METHODS on logits, or of the task's own losses on outputs: "bernoulli_kl" of
        multilabel, "squared_error" and "teacher_bounded" of regression.
      alpha: its weight, in [0, 1].
      **options: of the loss.
    """
    return {"task": 1 - alpha, "terms": {loss: {"loss": loss, "weight": alpha, **options}}}


def compression_arms(
    *,
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    further: Mapping[str, Any],
    distill: str,
) -> ConfigDict:
    """Arms over the models "teacher" and "student", in the order of the table.

    The teacher; the student by labels (`student`) and by the teacher (`kd`); both trained for as
    long as QAT gets (`*_longer`: the controls of equal steps); PTQ of both by absmax and by least
    squares; QAT from `student`; QAD from `student` and from `kd`. Each but the first two names the
    arm that it is to be compared with: QAT its own starting point calibrated, QAD the QAT of equal
    bits and steps.

    Args:
      teacher: fields of `kdq.config.Arm` for the teacher: "epochs", "learning_rate".
      student: the same for the student from fresh weights.
      further: the same for the training that follows: the controls, QAT and QAD.
      distill: how every arm that is taught is: a key of `config.distill`.
    """
    taught = {"teacher": "teacher", "distill": distill}
    arms = {
        "teacher": arm(model="teacher", **teacher),
        "student": arm(model="student", **student),
        "student_longer": arm(model="student", init="student", reference="student", **further),
        "kd": arm(model="student", reference="student", **student, **taught),
        "kd_longer": arm(model="student", init="kd", reference="kd", **further, **taught),
    }
    for bits in CALIBRATED:
        for start in ("student", "kd"):
            for observer in ("absmax", "mse"):
                name = f"ptq_{bits.lower()}_{start}_{observer}"
                arms[name] = arm(
                    model="student", init=start, bits=bits, observer=observer, reference=start
                )
    for bits in TRAINED:
        trained, suffix = {"model": "student", "bits": bits, **further}, bits.lower()
        qat = f"qat_{suffix}"
        arms[qat] = arm(**trained, init="student", reference=f"ptq_{suffix}_student_mse")
        for start in ("student", "kd"):
            arms[f"qad_{suffix}_{start}"] = arm(**trained, **taught, init=start, reference=qat)
    return ConfigDict(arms, sort_keys=False)


def quantized_arms(
    widths: Sequence[str], *, further: Mapping[str, Any], taught: Mapping[str, Any]
) -> ConfigDict:
    """Arms of the models "student" and "kd" at each of `widths`: both calibrated, QAT and QAD.

    Calibrated arms are compared with where they start, QAT with its own starting point calibrated,
    QAD, which starts from `kd`, with the QAT of equal bits and steps.

    Args:
      widths: "W8A8" and the like.
      further: fields of `kdq.config.Arm` for the training of QAT and QAD.
      taught: those of who teaches QAD, and how.
    """
    arms = ConfigDict(sort_keys=False)
    for bits in widths:
        name = bits.lower()
        for start in ("student", "kd"):
            arms[f"ptq_{name}_{start}"] = arm(
                model="student", init=start, bits=bits, reference=start
            )
        trained = {**further, "bits": bits}
        arms[f"qat_{name}"] = arm(**trained, init="student", reference=f"ptq_{name}_student")
        arms[f"qad_{name}"] = arm(**trained, **taught, init="kd", reference=f"qat_{name}")
    return arms


def searched_arms(
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    budgets: Mapping[str, Mapping[str, Any]],
    *,
    shared: Mapping[str, Any],
    trained: Mapping[str, Any],
    baseline: str = "uniform",
) -> tuple[ConfigDict, ConfigDict]:
    """`(searches, arms)` of a study: every method under every budget, before and after training.

    "METHOD_BUDGET" is a search, and the arms "METHOD_BUDGET_ptq" and "METHOD_BUDGET_qad" are what
    it found, calibrated and then trained. Each is compared with the same arm of the baseline.

    Args:
      methods: keys of kdq.search.searchers.METHODS, or {name: fields of Search}.
      budgets: fields of `kdq.config.Search` by the name of the budget: {"3bit": {"most": ...}}.
      shared: fields of every search.
      trained: fields of the arms that are trained: "model", "init", "teacher", "epochs", ...
      baseline: one of the methods.
    """
    searches, arms = ConfigDict(sort_keys=False), ConfigDict(sort_keys=False)
    calibrated = {key: trained[key] for key in ("model", "init")}
    by_name = {method: {"method": method} for method in methods}
    if isinstance(methods, Mapping):
        by_name = methods
    for budget, limits in budgets.items():
        for method, fields in by_name.items():
            name = f"{method}_{budget}"
            searches[name] = search(**{**shared, **limits, **fields})
            for suffix, kind in (("ptq", calibrated), ("qad", trained)):
                reference = "" if method == baseline else f"{baseline}_{budget}_{suffix}"
                arms[f"{name}_{suffix}"] = arm(**{**kind, "bits": name, "reference": reference})
    return searches, arms
