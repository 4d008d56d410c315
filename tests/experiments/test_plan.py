"""The planner: its arithmetic, and compiling for machines that are not here."""

import importlib.util
import json

import jax
import pytest
from flax import nnx
from processes import run

from stca_jax import device_plan
from stca_jax.config import apply_overrides
from stca_jax.errors import UserError
from stca_jax.experiment import experiment_program
from stca_jax.experiments.configs import paper_133m, tiny
from stca_jax.experiments.plan import config_schema
from stca_jax.models.ranker import Ranker
from stca_jax.training import cross_compile
from stca_jax.training.state import split_ranker

PAPER = "experiments/configs/paper_133m.py"
HLO = """HloModule jit_train_step, is_scheduled=true

%region_1.2 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%inner (p: f32[8]) -> f32[16] {
  ROOT %all-gather.1 = f32[16]{0:T(128)} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}

%body.3 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %call = f32[16]{0} call(%x), to_apply=%inner
  %a2a = (bf16[4,2]{1,0:T(8,128)(2,1)}, bf16[4,2]{1,0}, /*index=2*/s32[3]{0}) all-to-all(%y, %z, %w)
}

%condition.4 (state: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %all-reduce.1 = (f32[64,128]{1,0:T(8,128)S(1)}, f32[1]{0}) all-reduce(%p), to_apply=%region_1.2
  %all-reduce.2 = bf16[10]{0} all-reduce(%p), to_apply=%region_1.2
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %while.5 = (s32[], f32[8]) while(%init), condition=%condition.4, body=%body.3
}
"""


def test_collectives_are_counted_by_kind_and_place():
    assert cross_compile.collectives(HLO) == [
        ("all-gather", False, 1, 128),
        ("all-gather", True, 1, 64),
        ("all-reduce", False, 2, 4 * (64 * 128 + 1) + 20),
        ("all-to-all", True, 1, 2 * 16 + 12),
    ]


def test_vocabularies_are_set_by_name():
    schema = device_plan.with_vocabulary(paper_133m.get_schema(), ["item=7", "hour=3"])
    assert (schema.vocabularies["item"], schema.vocabularies["hour"]) == (7, 3)
    for text in ("itme=7", "item", "item=-1", "item=0"):
        with pytest.raises(UserError, match="give NAME=ROWS, with a name of item, author"):
            device_plan.with_vocabulary(schema, [text])


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:2by4", "tpu:2x4", "h100:x"])
def test_topology_that_is_none_is_refused(topology):
    with pytest.raises(UserError, match="give a TPU slice such as v5e:2x4"):
        cross_compile.topology_devices(topology)


def test_paper_config_has_the_size_it_says():
    config, schema = paper_133m.get_config(), paper_133m.get_schema()
    ranker = nnx.eval_shape(lambda: Ranker(config.model, schema, rngs=nnx.Rngs(0)))
    _, dense, _ = split_ranker(ranker)
    assert sum(x.size for x in jax.tree.leaves(dense)) == pytest.approx(133e6, rel=0.01)
    assert config_schema(PAPER, config) == schema


def advice(capacity: int, **memory: int) -> str:
    mesh = {"data": 2, "sequence": 1, "model": 1}
    memory = {"dense": 0, "tables": 0, "table optimizer": 0, "activations": 0} | memory
    plan = device_plan.Plan("v5e:1x2", mesh, {}, memory, capacity, [], 1.0, {}, [])
    config = apply_overrides(tiny.get_config(), {"input.rows_per_batch": 32})  # 16 a device
    return device_plan.advise(plan, config)[0]


def test_advice_is_the_least_that_fits():
    # 60 of activations must fit 20: in 4 parts, since 3 does not divide 16 rows.
    assert "accumulate_steps=4" in advice(100, tables=80, activations=60)
    assert "even one row at a time" in advice(100, tables=99, activations=60)
    # 2 x 160 of tables in rooms of 70: 5 devices.
    assert "at least 5 devices" in advice(100, dense=30, tables=160, activations=9)
    assert "mesh.model=N" in advice(100, dense=101)


def planned(*arguments: str, timeout: float = 300) -> tuple[int, dict]:
    status, output = run(
        "experiments.plan", *arguments, "--json", timeout=timeout, TPU_STDERR_LOG_LEVEL="3"
    )
    start = output.find("\n{\n") + 1 if not output.startswith("{") else 0
    try:
        return status, json.JSONDecoder().raw_decode(output[start:])[0]
    except ValueError:
        raise AssertionError(output) from None


def check_tiny(plan: dict, dataset) -> None:
    """Against a program of one device that could run here, and the rules of data parallelism."""
    config = apply_overrides(tiny.get_config(), {"mesh.data": 1})
    mesh = jax.sharding.Mesh([[jax.devices()[:1]]], ("data", "sequence", "model"))
    state = experiment_program(config, dataset.schema, 1, mesh).abstract_state
    dense, optimizer = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in (state.dense, state.optimizer)
    )
    assert plan["parameters"]["dense"] == dense / 4
    assert plan["memory"]["dense parameters"] == dense
    assert plan["memory"]["dense optimizer"] == optimizer
    assert 0 < plan["memory"]["activations"] < 2**30
    assert plan["fits"]
    reduced = sum(c["bytes"] for c in plan["collectives"] if c["kind"] == "all-reduce")
    assert reduced >= dense  # every dense gradient, and little more
    assert reduced < 4 * dense


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu")
def test_tiny_on_a_tpu_slice(data_dir, tiny_dataset):
    status, plan = planned(
        "--config=experiments/configs/tiny.py", f"--data_dir={data_dir}", "--topology=v5e:2x4"
    )
    assert status == 0
    assert plan["mesh"] == {"data": 8, "sequence": 1, "model": 1}
    check_tiny(plan, tiny_dataset)


@pytest.mark.exhaustive
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install jax-cuda13-plugin"
)
def test_tiny_on_gpus(data_dir, tiny_dataset):
    status, plan = planned(
        "--config=experiments/configs/tiny.py", f"--data_dir={data_dir}", "--topology=h100:8"
    )
    assert status == 0
    check_tiny(plan, tiny_dataset)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu")
def test_says_what_does_not_fit(data_dir):
    status, plan = planned(
        "--config=experiments/configs/tiny.py", f"--data_dir={data_dir}", "--topology=v5e:2x4",
        "--vocabulary=item=2100000000",
    )  # fmt: skip
    assert status == 2
    assert not plan["fits"]
    assert plan["total"] > plan["capacity"] > 15 * 2**30
    # 2.1e9 rows of 128 lanes and their sums of squares are 1,009 GiB, of which 15.7 fit a device.
    assert "at least 65 devices" in plan["advice"][0]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("topology", "change"),
    [
        ("v5e:2x4", "input.rows_per_batch=8"),
        ("v5e:16x16", "input.rows_per_batch=256"),
        ("v6e:2x4", "input.rows_per_batch=8"),
        ("v5p:4x4x4", "training.accumulate_steps=4"),
        ("h100:8", "input.rows_per_batch=8"),
    ],
)
def test_paper_133m(topology, change):
    """A table of 100 M rows and histories of 10,000 events; neither moves between devices."""
    status, plan = planned(
        f"--config={PAPER}", f"--topology={topology}", f"--config.{change}", timeout=1_500
    )
    print(json.dumps(plan))  # shown by pytest -rP, for the headers of the configs
    assert status == 0
    assert plan["fits"]
    config = paper_133m.get_config()
    dense = plan["parameters"]["dense"]
    tokens = 2 * config.input.row_length * config.model.sequence.width  # of a row, in bfloat16
    by_kind: dict[str, int] = {}
    for c in plan["collectives"]:
        by_kind[c["kind"]] = by_kind.get(c["kind"], 0) + c["bytes"]
    assert by_kind.get("all-gather", 0) < tokens / 2
    # Every dense gradient once, in bfloat16 or float32; rows of tables.
    assert 2 * dense <= by_kind["all-reduce"] < 4.4 * dense
    assert 0 < by_kind.get("all-to-all", 0) + by_kind.get("ragged-all-to-all", 0) < 4 * dense


def test_unknown_topology_is_one_clear_error(data_dir):
    status, output = run(
        "experiments.plan", "--config=experiments/configs/tiny.py", f"--data_dir={data_dir}",
        "--topology=v9:2x4",
    )  # fmt: skip
    assert status == 1
    assert "error: --topology=v9:2x4: give a TPU slice" in output
    assert "Traceback" not in output
