"""One experiment: the config that a run needs to be made again, and what is built from it."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from stca_jax.batch import empty_batch
from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.input import pipeline
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.planning import InputConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.schema import Schema
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.metrics_writer import WandbConfig
from stca_jax.training.monitoring import ProfileConfig
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.sharding import MeshConfig, make_mesh
from stca_jax.training.state import TrainState
from stca_jax.training.table_start import start_from_cooccurrence
from stca_jax.training.train_step import Program, TrainingConfig


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One experiment.

    Attributes:
      dataset: A builder of `data/`, optionally with its config: "complete_journey/next_purchase".
      input: From user records to packed batches.
      model: What is trained.
      optimizer: How.
      training: For how long.
      checkpoint: When to save and what to keep.
      evaluation: What to measure.
      mesh: How devices are arranged.
      profile: Which steps to trace.
      wandb: Also log to Weights & Biases.
      seed: Of initial parameters; `input.seed` is that of order and lengths.
    """

    dataset: str
    input: InputConfig
    model: RankerConfig = RankerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()
    wandb: WandbConfig | None = None
    seed: int = 0


# A resumed run may change these: they do not change what is learned.
FREE_TO_CHANGE = (
    "checkpoint.",
    "evaluation.",
    "input.num_threads",
    "input.prefetch",
    "mesh.",
    "model.remat",
    "profile.",
    "training.accumulate_steps",
    "training.log_every_steps",
    "wandb",
)


def count_steps(config: ExperimentConfig, dataset: RequestDataset) -> int:
    """Steps of the whole run; see `pipeline.count_steps`."""
    training = config.training
    return pipeline.count_steps(dataset, config.input, training.num_epochs, training.max_steps)


def training_input(
    config: ExperimentConfig,
    dataset: RequestDataset,
    process_index: int = 0,
    process_count: int = 1,
) -> pipeline.RequestIterator:
    """The batches of a training, without end: `training.num_epochs` is the run's.

    Args:
      config: The experiment.
      dataset: Its dataset.
      process_index: See `pipeline.make_input`.
      process_count: See `pipeline.make_input`.
    """
    return pipeline.make_input(
        dataset,
        dataclasses.replace(config.input, epochs=None),
        process_index=process_index,
        process_count=process_count,
        with_unlabelled=_reads_unlabelled(config),
    )


def experiment_program(
    config: ExperimentConfig, schema: Schema, num_steps: int, mesh: Mesh | None = None
) -> Program:
    """The experiment's compiled functions.

    Args:
      config: The experiment.
      schema: Of its dataset.
      num_steps: Length of the learning-rate schedule.
      mesh: By default the configured one, of all devices.

    Raises:
      UserError: the mesh does not fit the devices, the batch or the model.
    """
    shapes = empty_batch(
        schema,
        config.input.rows_per_batch,
        config.input.row_length,
        config.input.targets_per_row,
        shared_history=config.input.rows == "user",
        with_unlabelled=_reads_unlabelled(config),
    )
    return Program(
        config.model,
        schema,
        config.optimizer,
        config.training,
        mesh or make_mesh(config.mesh),
        shapes,
        num_steps=num_steps,
        seed=config.seed,
    )


def _reads_unlabelled(config: ExperimentConfig) -> bool:
    return any(loss.reads_unlabelled for loss in config.training.auxiliary_losses)


def initial_state(
    config: ExperimentConfig, dataset: RequestDataset, program: Program
) -> TrainState:
    """The state before the first step; tables may start from the dataset's histories."""
    state = program.initialize()
    if config.model.embedding.initialization == "cooccurrence":
        tables = start_from_cooccurrence(state.tables, config.model, dataset, config.seed)
        state = dataclasses.replace(state, tables=tables)
    return state
