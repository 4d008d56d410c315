r"""How long a run takes to its next step, from the start of the process.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 \
        python -m stca_jax.experiments.benchmarks.start_up --config=FILE [--data_dir=DIR]

Trains into a directory of its own, and stops each process with SIGTERM, which leaves a checkpoint,
once it has reported a step: a new run with nothing compiled; the same, resumed, with nothing
compiled; and twice with the programs of the process before. Prints seconds on the clock until all
is ready but the program (imports, planning, restoring), until the first step is reported, and
until the process has ended. The dataset is prepared before.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from stca_jax.data.preparation import prepare
from stca_jax.errors import UserError
from stca_jax.evaluation.tables import format_table
from stca_jax.experiments import launch

_RUNS = flags.DEFINE_integer("runs", 2, "Resumed runs with a warm cache.", lower_bound=1)
_READY = "the first step is compiled"  # what the trainer says before it does so


def main() -> None:
    """Prints the table."""
    prepare(launch.load_config().dataset, launch.DATA_DIR.value)
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        rows = [timed("new, nothing compiled", folder)]
        shutil.rmtree(folder / "compiled")
        rows.append(timed("resumed, nothing compiled", folder))
        rows += [timed("resumed, compiled before", folder) for _ in range(_RUNS.value)]
    print(format_table(rows))


def timed(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Seconds of one process, which is stopped after its first step.

    Raises:
      UserError: it ends before it has reported a step.
    """
    workdir, compiled = folder / "run", folder / "compiled"
    command = [sys.executable, "-m", "stca_jax.experiments.train", f"--workdir={workdir}",
               f"--config={launch.config_path()}",
               "--config.training.log_every_steps=1"]  # fmt: skip
    if launch.DATA_DIR.value:
        command.append(f"--data_dir={launch.DATA_DIR.value}")
    before = last_step(workdir)
    output = folder / "output"
    began = time.monotonic()
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stderr=file, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
        )
    try:
        ready = None
        while last_step(workdir) == before:
            time.sleep(0.01)
            if ready is None and _READY in output.read_text():
                ready = time.monotonic()
            if process.poll() is not None:
                raise UserError(f"the training ended:\n{output.read_text()}")
        stepped = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait()
        ended = time.monotonic()
    finally:
        process.kill()
    return {"run": name, "ready (s)": round((ready or stepped) - began, 1),
            "first step (s)": round(stepped - began, 1), "ended (s)": round(ended - began, 1),
            "steps before": before}  # fmt: skip


def last_step(workdir: pathlib.Path) -> int:
    """The last that a run has reported; 0 before the first."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


if __name__ == "__main__":
    launch.run(main, takes_config=True)
