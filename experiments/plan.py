"""Compiles an experiment's train step for machines that are not here, and says whether it fits.

python -m stca_jax.experiments.plan --config=experiments/configs/paper_133m.py --topology=v5e:16x16
    [--num_slices=N] [--config.NAME=VALUE ...] [--vocabulary=item=100000000,...] [--json]
    [--data_dir=DIR]

Topologies are TPU slices as Cloud TPU names them (v5e, v5p and v6e; needs `pip install libtpu`)
or GPUs of one node, h100:8 or a100:8 (needs `pip install jax-cuda13-plugin jax-cuda13-pjrt`);
--num_slices=N is for N of them.  No accelerator, no data preparation beyond what the schema needs,
and no memory for the model are needed: nothing is run.

The schema is that of the config's dataset, or of the config file itself if that defines
`get_schema()`; --vocabulary sets sizes of vocabularies by name.

Exit status: 0 it fits, 1 an error, 2 it does not fit.
"""

from __future__ import annotations

import runpy

from absl import flags

from stca_jax.data.preparation import prepare
from stca_jax.device_plan import make_plan, with_vocabulary
from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments import launch
from stca_jax.input.dataset import RequestDataset
from stca_jax.schema import Schema
from stca_jax.training.cross_compile import compile_only

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, h100:8, …", required=True)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices or nodes of that topology.", 1)
_VOCABULARY = flags.DEFINE_list("vocabulary", [], "Sizes of vocabularies, NAME=ROWS.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def main() -> int:
    """Prints the plan."""
    compile_only()
    config = launch.load_config()
    schema = with_vocabulary(config_schema(launch.config_path(), config), _VOCABULARY.value)
    with launch.working(f"Compiling for {_TOPOLOGY.value}"):
        plan = make_plan(config, schema, _TOPOLOGY.value, _NUM_SLICES.value)
    print(plan.to_json() if _JSON.value else plan.to_text())
    return 0 if plan.fits else 2


def config_schema(path: str, config: ExperimentConfig) -> Schema:
    """The schema that the config file defines, or that of its dataset."""
    get_schema = runpy.run_path(path).get("get_schema")
    if get_schema is not None:
        return get_schema()
    return RequestDataset(prepare(config.dataset, launch.DATA_DIR.value)).schema


if __name__ == "__main__":
    launch.run(main, takes_config=True)
