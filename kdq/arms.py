"""The standard set of arms, for config files: distill, quantize, both, and their controls."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from kdq.config import arm

CALIBRATED = ("W8A8", "W4A4", "W3A3", "W2A2")
TRAINED = ("W4A4", "W3A3", "W2A2")


def kl(alpha: float, temperature: float) -> dict[str, Any]:
    """The recipe `(1 - alpha) CE + alpha T² KL(teacher ‖ student)` for `config.distill`."""
    term = {"loss": "kl", "weight": alpha, "temperature": temperature}
    return {"task": 1 - alpha, "terms": {"kl": term}}


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
