"""Trains one experiment, or goes on with it.

python -m stca_jax.experiments.train --config=experiments/configs/tiny.py --workdir=/path/to/run
    [--config.NAME=VALUE ...] [--data_dir=DIR]

The same command, run again after an interruption, continues from the latest checkpoint. With
--config=FILE --help it lists every value of the config.

Exit status: 0 finished, 1 an error, 143 after SIGTERM and 130 after Ctrl-C, both with a checkpoint.
"""

from __future__ import annotations

import logging
import shlex

from absl import flags

from stca_jax.data.preparation import prepare
from stca_jax.experiments import launch
from stca_jax.input.dataset import RequestDataset
from stca_jax.trainer import train

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run: checkpoints, metrics, config.", required=True
)


_log = logging.getLogger(__name__)


def main() -> int:
    """Prepares the dataset on first use, then trains."""
    config = launch.load_config()
    workdir = launch.local_path("workdir", _WORKDIR.value)
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    result = train(config, dataset, workdir)
    if result.signal is not None:
        _log.warning(
            "stopped by %s at step %d of %d; run the same command to go on from %s:\n  %s",
            result.signal.name,
            result.step,
            result.num_steps,
            workdir,
            launch.command(),
        )
        return 128 + result.signal
    named = {"workdir": str(workdir), "data_dir": launch.DATA_DIR.value}
    arguments = shlex.join(f"--{name}={value}" for name, value in named.items() if value)
    _log.info(
        "finished %d steps; evaluate with\n  python -m stca_jax.experiments.evaluate %s\n"
        "checkpoints, metrics and config are in %s",
        result.step,
        arguments,
        workdir,
    )
    return 0


if __name__ == "__main__":
    launch.run(
        main,
        takes_config=True,
        when_interrupted="checkpoints, if there are any, are kept; the same command goes on",
    )
