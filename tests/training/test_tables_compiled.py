"""What the compiled train step does with tables: rows move between devices, tables never do."""

import re

import jax
import own_process
import pytest

WIDTH = 16
ROWS, LENGTH, TARGETS = 8, 256, 12


def compiled_step(num_items: int, devices, sizes=(2, 2, 2), tables: str = "adagrad"):
    """A train step with two large tables, one of which has `num_items` rows."""
    from stca_jax.batch import empty_batch
    from stca_jax.models.embedding import EmbeddingConfig
    from stca_jax.models.ranker import RankerConfig
    from stca_jax.models.rankmixer import RankMixerConfig
    from stca_jax.models.stca import StcaConfig
    from stca_jax.schema import Schema
    from stca_jax.training.optimizer import OptimizerConfig
    from stca_jax.training.sharding import MeshConfig, make_mesh
    from stca_jax.training.train_step import Program, TrainingConfig

    schema = Schema(
        history=("item", "author"), target=("item", "author"), request=(),
        vocabularies={"item": num_items, "author": 98_304}, tasks=("click",),
    )  # fmt: skip
    model = RankerConfig(
        sequence=StcaConfig(width=8, num_layers=1, num_heads=2),
        embedding=EmbeddingConfig(item_width=WIDTH, feature_width=WIDTH // 2),
        backbone=RankMixerConfig(num_blocks=1),
        match_channel=False,
    )
    batch = empty_batch(schema, ROWS, LENGTH, TARGETS, shared_history=True)
    program = Program(
        model, schema, OptimizerConfig(tables=tables), TrainingConfig(),
        make_mesh(MeshConfig(*sizes), devices), batch, num_steps=10, seed=0,
    )  # fmt: skip
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        batch, program.batch_shardings,
    )  # fmt: skip
    with jax.set_mesh(program.batch_shardings.history_time.mesh):
        step = program.train_step.__wrapped__.lower(program.abstract_state, abstract).compile()
    return step, program


def rows_of_a_block(program) -> int:
    table = program.abstract_state.tables["item"]
    return table.sharding.shard_shape(table.shape)[0]


COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def check_collectives(text: str, block_rows: int) -> None:
    """No collective carries a table or a device's block of one, nor anything of that many rows.

    All tables share three exchanges: row numbers, rows, and gradients with their row numbers.
    """
    exchanges = 0
    for line in text.splitlines():
        collective = COLLECTIVE.search(line)
        if collective is None:
            continue
        exchanges += collective[1] == "all-to-all" and "/all_to_all" in line  # not XLA's own
        shapes = line.split(collective[0])[0]
        for dims in re.findall(r"\[([\d,]+)\]", shapes):
            assert max(map(int, dims.split(","))) < block_rows, line
    assert exchanges == 3


def check_step(devices, tables: str = "adagrad") -> None:
    steps = [compiled_step(rows, devices, tables=tables) for rows in (98_304, 9_830_400)]
    memory = [step.memory_analysis().temp_size_in_bytes for step, _ in steps]
    step, program = steps[1]
    block_rows = rows_of_a_block(program)
    assert block_rows == 9_830_400 // 8
    assert memory[1] < block_rows * WIDTH  # a quarter of a block: no dense gradient, no copy
    assert memory[1] - memory[0] < block_rows * WIDTH * 4 / 20, memory
    check_collectives(step.as_text(), block_rows)


def check_cpu() -> None:
    for tables in ("adagrad", "adam"):
        check_step(jax.devices(), tables)


def check_tpu() -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    check_step(list(devices))


def check_initialization() -> None:
    """Every device draws its own rows: no collective, and no memory for anybody else's."""
    _, program = compiled_step(9_830_400, jax.devices())
    initialize = program.initialize.lower().compile()
    block = rows_of_a_block(program) * WIDTH * 4
    memory = initialize.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * block  # three copies of its random bits
    assert memory.output_size_in_bytes < 1.5 * block
    assert "all-gather" not in initialize.as_text()


def check_one_device() -> None:
    steps = [compiled_step(rows, jax.devices()[:1], (1, 1, 1))[0] for rows in (98_304, 9_830_400)]
    memory = [step.memory_analysis().temp_size_in_bytes for step in steps]
    assert memory[1] <= 1.01 * memory[0], memory


@pytest.mark.slow
def test_one_cpu_device():
    own_process.call("test_tables_compiled", "check_one_device")


@pytest.mark.exhaustive
def test_eight_cpu_devices():
    own_process.call(
        "test_tables_compiled", "check_cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8"
    )


@pytest.mark.exhaustive
def test_initialization_on_eight_devices():
    own_process.call(
        "test_tables_compiled",
        "check_initialization",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )


@pytest.mark.exhaustive
def test_eight_tpu_devices():
    own_process.call(
        "test_tables_compiled", "check_tpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
