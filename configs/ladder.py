r"""A comparison of quantization methods: which steps help at which bit-width.

python launch/compress.py --config=configs/ladder.py --workdir=runs/ladder

On Fashion-MNIST, with a shorter schedule and one teacher, trained by configs/fashion_mnist.py:

python launch/compress.py --config=configs/ladder.py:fashion --config.data.data_dir=data \
    --workdir=runs/ladder_fashion \
    --config.arms.teacher.load=runs/fashion_mnist/teacher/0/model.safetensors

At each bit-width the arms start from the same student: rounding to nearest with min-max ranges and
with MSE ranges; each post-training method, starting from MSE ranges; each method for training
quantizers, with and without dampened oscillations; and training with the teacher, in three ways.
The `reference` of an arm is the arm it is compared with. `pivot.md` of the run is the table.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from kdq.arms import kl
from kdq.config import arm, complete, parse_arg

WIDTHS = ("W8A8", "W4A8", "W4A4", "W3A3", "W2A4", "W2A2")
QAT = ("ste", "lsq", "lsq_plus", "pact", "dorefa")
# At the end of training, from nothing at its start. The mean over widths, STE and LSQ was best on
# validation of digits, in seeds of its own, with the smallest (`:tune,seeds=2`).
DAMPEN = {"low": 1e-4, "mid": 1e-3, "high": 1e-2}
CHOSEN = "low"


def get_config(argument: str | None = None) -> ConfigDict:
    """The study. `argument` is "fashion", "quick", "tune" (of the dampening), "seeds=N"."""
    argument = parse_arg(argument, fashion=False, quick=False, tune=False, seeds=0)
    name = "fashion_mnist.py" if argument.fashion else "digits.py"
    path = Path(__file__).with_name(name)
    seeds = argument.seeds or (1 if argument.quick else 3)
    base = f"seeds={seeds}" + (",quick" if argument.quick else "")
    config = runpy.run_path(str(path))["get_config"](base)
    if argument.tune:
        config.seeds = tuple(100 + seed for seed in range(seeds))
    further = {"epochs": config.arms.qat_w4a4.epochs, "learning_rate": 1e-2, "augment": False}
    config.ptq = ptq()
    if argument.fashion:  # for a CPU: batches of 64, a third of an epoch, fewer steps of PTQ
        config.ptq = ptq({"steps": 300}, {"rounding_steps": 300})
        further |= {"epochs": config.arms.qat_w4a4.epochs / 12, "learning_rate": 2e-3}
        config.arms.student.learning_rate = 5e-3
        config.data.batch_size, config.data.augment = 64, ()
        config.quantize.calibration_examples = 512
        config.arms.teacher.epochs = 0.0  # it is loaded
    config.evaluations = 4 if argument.fashion else 20
    temperature = config.distill.kd.terms.kl.temperature
    config.distill = {
        "kd": dict(config.distill.kd),
        "kl_only": kl(alpha=1.0, temperature=temperature),
        # Both ways, with the labels as heavy: with a tenth of them the two agree on nothing much.
        "mutual": kl(alpha=0.5, temperature=temperature),
    }
    config.qat = {method: {"method": method} for method in QAT}
    for level, weight in DAMPEN.items():
        for method in QAT:
            dampen = {"kind": "cosine", "start": 0.0, "end": weight}
            suffix = "" if level == CHOSEN else f"_{level}"
            config.qat[f"{method}_damped{suffix}"] = {"method": method, "dampen": dampen}
    arms = {
        "teacher": dict(config.arms.teacher),
        "student": dict(config.arms.student),
        "student_longer": arm(model="student", init="student", reference="student", **further),
    }
    config.teachers = {}
    for bits in WIDTHS:
        arms |= (
            _tuning(bits, further)
            if argument.tune
            else _rungs(config, bits, further, argument.fashion)
        )
    config.arms = ConfigDict(arms, sort_keys=False)
    return complete(config)


def ptq(learned: dict | None = None, guided: dict | None = None) -> dict[str, tuple[dict, ...]]:
    """Chains of one method or two, with options of those that learn."""
    # The student's layers are in a row, so the block of BRECQ is the whole network.
    learned, block = learned or {}, {"method": "brecq", "blocks": ("",)}
    return {
        "corrected": ({"method": "equalize"}, {"method": "bias_correction"}),
        "adaround": ({"method": "adaround", **learned},),
        "brecq": ({**block, **learned},),
        "qdrop": ({**block, "drop": 0.5, **learned},),
        "gptq": ({"method": "gptq"},),
        "guided": ({"method": "teacher_guided", **(guided or {})},),
    }


def _rungs(config: ConfigDict, bits: str, further: dict, short: bool) -> dict[str, dict]:
    """All arms of a width, or but the slow ones; `config` gets the teachers that they need."""
    name = lambda step: f"{bits.lower()}_{step}"
    base = {"model": "student", "init": "student", "bits": bits}
    arms = {
        name("rtn"): arm(**base, observer="min_max", reference="student"),
        name("mse"): arm(**base, reference=name("rtn")),
    }
    for chain in ptq():
        arms[name(chain)] = arm(**base, ptq=chain, reference=name("mse"))
    if not short:
        arms[name("guided_teacher")] = arm(
            **base, ptq="guided", teacher="teacher", reference=name("guided")
        )
    for method in QAT:
        trained = {**base, **further}
        arms[name(method)] = arm(**trained, qat=method, reference=name("mse"))
        arms[name(f"{method}_damped")] = arm(
            **trained, qat=f"{method}_damped", reference=name(method)
        )
    taught = {**base, **further, "distill": "kd", "reference": name("lsq")}
    arms[name("qad")] = arm(**taught, teacher="teacher")
    arms[name("qad_kl_only")] = arm(**{**taught, "distill": "kl_only"}, teacher="teacher")
    if short and bits not in ("W4A4", "W2A2"):  # a peer of the teacher's size trains along
        return arms
    # In three stages of a third of the epochs each (arXiv:1911.12491).
    third = {**taught, "epochs": further["epochs"] / 3}
    peer, former = f"peer_{bits.lower()}", f"former_{bits.lower()}"
    config.teachers[peer] = {"kind": "peer", "model": "teacher", "init": "teacher"}
    config.teachers[former] = {"kind": "former_peer", "arm": name("qad_2_co_study")}
    arms[name("qad_1_self_study")] = arm(**{**third, "distill": ""})
    together = {**third, "init": name("qad_1_self_study"), "distill": "mutual"}
    arms[name("qad_2_co_study")] = arm(**together, teacher=peer)
    arms[name("qad_3_tutored")] = arm(**{**third, "init": name("qad_2_co_study")}, teacher=former)
    return arms


def _tuning(bits: str, further: dict) -> dict[str, dict]:
    """Each weight of the dampening, of the two methods that every width trains well with."""
    arms = {}
    for method in ("ste", "lsq"):
        trained = {"model": "student", "init": "student", "bits": bits, **further}
        for level in ("", *DAMPEN):
            suffix = {"": "", CHOSEN: "_damped"}.get(level, f"_damped_{level}")
            arms[f"{bits.lower()}_{method}{'_' if level else ''}{level}"] = arm(
                **trained, qat=f"{method}{suffix}"
            )
    return arms
