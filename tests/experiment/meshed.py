"""Runs an arm of a config on so many devices: what the tests of meshes start in processes.

    python meshed.py CONFIG.json WORKDIR DEVICES [STOP_AT [PORT PROCESSES ID]]

STOP_AT is a step of the arm "qad" at which the process dies; 0 is none.
"""

import json
import os
import sys


def main(config_file, workdir, devices, stop_at="0", port="", count="1", index="0"):
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    from kdq import config, experiment, processes  # noqa: PLC0415 - once the devices are set

    if port:
        processes.start(f"127.0.0.1:{port}", int(count), int(index))

    class Dies(experiment.Progress):
        def arm(self, name, seeds, steps):
            self.name = name

        def step(self, step):
            if self.name == "qad" and step == int(stop_at):
                os._exit(9)

    with open(config_file) as file:
        frozen = config.freeze(json.load(file))
    records = experiment.run(frozen, workdir, arms=["qad"], progress=Dies())
    assert all(record.status == "ok" for record in records), records


if __name__ == "__main__":
    main(*sys.argv[1:])
