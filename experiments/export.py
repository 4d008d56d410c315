"""Exports a checkpoint into a folder that a server loads.

    python -m stca_jax.experiments.export --workdir=/path/to/run --output=/path/to/model
        [--step=best|last|N] [--max_history=N] [--uncached] [--data_dir=DIR]

The folder has programs for CPUs, NVIDIA GPUs and TPUs, weights, tables, what encodes raw values,
and requests with the evaluation's logits, which a server must reproduce before it serves; see
docs/serving.md. It is written whole or not at all.

A server reads the latest --max_history events of a user, by default the longest length of the
config's evaluation. --uncached exports models whose events cannot be encoded once, such as a
Transformer: a server then encodes the whole history for every request.
"""

from __future__ import annotations

from absl import flags

from stca_jax.data.preparation import prepare
from stca_jax.experiments import launch
from stca_jax.export.folder import ExportOptions, export_checkpoint
from stca_jax.input.dataset import RequestDataset
from stca_jax.workdir import checkpoint_step, load_workdir_config

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write, which is not there.", required=True)
_STEP = flags.DEFINE_string("step", "best", "best, last, or the step of a checkpoint.")
_MAX_HISTORY = flags.DEFINE_integer(
    "max_history", None, "Events of a user that a server reads, the latest.", lower_bound=1
)
_UNCACHED = flags.DEFINE_bool("uncached", False, "Encode the whole history for every request.")


def main() -> None:
    """Exports the checkpoint that --step names."""
    workdir = launch.local_path("workdir", _WORKDIR.value)
    output = launch.local_path("output", _OUTPUT.value)
    config = load_workdir_config(workdir)
    step = checkpoint_step(workdir, _STEP.value)
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    options = ExportOptions(_MAX_HISTORY.value, _UNCACHED.value)
    with launch.working("Exporting"):
        values = export_checkpoint(config, dataset, workdir, step, output, options)
    size = sum(file["bytes"] for file in values["files"].values())
    print(f"checkpoint {step} of {workdir}, {values['max_history']:,} events, {size:,} bytes")
    for name, difference in values["golden_differences"].items():
        print(f"golden requests, {name}: logits within {difference:.1e} of the evaluation's")
    print(f"the model is in {output}")


if __name__ == "__main__":
    launch.run(main)
