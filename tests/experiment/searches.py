"""The search that tests of searched arms start from; what watches one, and what one left behind."""

import json

from kdq import deploy, experiment, files
from kdq.quantize.layers import layer_bits

EXAMPLES = 150  # of validation: a whole batch, and part of the next
TAUGHT = {"teacher": "teacher", "distill": "kd"}


def searched(**fields):
    return {
        "method": "random",
        "students": ("wide",),
        "teacher": "teacher",
        "choices": ("W2A8", "W4A8", "W8A8"),
        "most": {"average_bits": 4.0},
        "evaluations": 8,
        "examples": EXAMPLES,
        **fields,
    }


class Watcher(experiment.Progress):
    """Notes the searches, and cuts one off at an evaluation."""

    def __init__(self, cut_at=None):
        self.searches, self.counts, self.cut_at = [], [], cut_at

    def search(self, name, seed, evaluations):
        self.searches.append((name, seed, evaluations))

    def evaluated(self, count, best):
        if count == self.cut_at:
            raise KeyboardInterrupt
        self.counts.append(count)


def evaluations(workdir, name="four"):
    (path,) = (workdir / "searches" / name / "0").glob("evaluations-*.jsonl")
    return [
        files.unseal(json.loads(line)) | {"seconds": 0} for line in path.read_text().splitlines()
    ]


def result(workdir, name="four"):
    """What a search came to, but for the time it took."""
    path = workdir / "searches" / name / "0" / "result.json"
    times = {"seconds": 0, "prepare_seconds": 0, "compile_seconds": 0}
    return files.read_json(path) | times


def bits_of_file(workdir, arm):
    packed = deploy.load_packed(workdir / arm / "0" / "model.safetensors")
    of = lambda path: {
        **packed.weight_quantizers.get(path, {}),
        **packed.qparams.get(path, {}),
    }
    return {path: layer_bits({path: of(path)}, path) for path in packed.variables["params"]}
