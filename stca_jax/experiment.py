"""The config of one experiment: everything that a run needs to be made again."""

from __future__ import annotations

import dataclasses

from stca_jax.evaluation.metrics import check_choice
from stca_jax.input.pipeline import InputConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.metrics_writer import WandbConfig
from stca_jax.training.monitoring import ProfileConfig
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.sharding import MeshConfig
from stca_jax.training.train_step import TrainingConfig


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Which requests to score, and at which history lengths.

    Attributes:
      lengths: History lengths of the final evaluation, in events.
      min_history: Only requests with at least this many earlier events, whatever the length.
      max_requests: At most this many requests, drawn at random once; None is all of them.
      validation_length: History length of the validation at each checkpoint of a training run.
      validation_requests: The same limit for that validation.
      metric: Column that chooses the best checkpoint on the validation split.
      larger_is_better: Whether a larger value of the metric is better.
    """

    lengths: tuple[int, ...] = (50, 100, 200, 500, 1_000, 2_000, 4_000)
    min_history: int = 0
    max_requests: int | None = None
    validation_length: int = 1_000
    validation_requests: int | None = 2_000
    metric: str = "auc"
    larger_is_better: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for lengths or numbers of requests below 1, or an unknown metric."""
        if not self.lengths or not all(n >= 1 for n in self.lengths):
            raise ValueError(f"lengths are {self.lengths}; give at least one, each at least 1")
        for name, least in {
            "min_history": 0, "max_requests": 1, "validation_length": 1, "validation_requests": 1,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN is refused
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        check_choice(self.metric, larger_is_better=self.larger_is_better)


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
