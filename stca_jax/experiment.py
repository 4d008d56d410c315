"""The config of one experiment: everything that a run needs to be made again."""

from __future__ import annotations

import dataclasses

from stca_jax.evaluation.metrics import COUNTS, METRICS, SMALLER_IS_BETTER
from stca_jax.input.pipeline import InputConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.loss import LossWeighting
from stca_jax.training.metrics_writer import WandbConfig
from stca_jax.training.monitoring import ProfileConfig
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.sharding import MeshConfig
from stca_jax.training.train_step import OnDivergence


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and what to report.

    Attributes:
      num_epochs: Passes over the training requests.  The steps of the first are counted; later
        ones, which draw other lengths, are taken to have as many.
      max_steps: Stop earlier, after this many steps; the schedule ends there too.
      loss_weighting: "target" is the per-impression objective; see `stca_jax.training.loss`.
      accumulate_steps: Micro-batches that a batch is cut into, one after the other in the memory of
        one; the update is that of the whole batch.
      on_divergence: What to do about a step that is not finite, or exceeds `max_gradient_norm`:
        "stop" the run, or "skip" the update and count it. Fifty such steps in a row stop the run in
        any case.
      max_gradient_norm: Largest norm of the dense gradient that is not taken for a spike.
      ema_decay: Evaluate an exponential moving average of the dense parameters; 0 keeps none.
      log_every_steps: Steps whose mean is one line of the metrics file.
    """

    num_epochs: int = 1
    max_steps: int | None = None
    loss_weighting: LossWeighting = "target"
    accumulate_steps: int = 1
    on_divergence: OnDivergence = "stop"
    max_gradient_norm: float | None = None
    ema_decay: float = 0.0
    log_every_steps: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        for name in ("num_epochs", "max_steps", "accumulate_steps", "log_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_gradient_norm is not None and self.max_gradient_norm <= 0:
            raise ValueError(f"max_gradient_norm is {self.max_gradient_norm}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Which requests to score, and at which history lengths.

    Attributes:
      lengths: History lengths of the final evaluation, in events.
      min_history: Only requests with at least this many earlier events, whatever the length.
      max_requests: At most this many requests, drawn at random once; None is all of them.
      validation_length: History length of the validation at each checkpoint of a training run.
      validation_targets: That validation scores a sample of requests with at most so many targets,
        which its standard error depends on; None is all.
      validation_requests: Likewise at most so many requests.
      metric: Column that chooses the best checkpoint on the validation split.
      larger_is_better: Whether a larger value of the metric is better.
    """

    lengths: tuple[int, ...] = (50, 100, 200, 500, 1_000, 2_000, 4_000)
    min_history: int = 0
    max_requests: int | None = None
    validation_length: int = 1_000
    validation_targets: int | None = 30_000
    validation_requests: int | None = None
    metric: str = "auc"
    larger_is_better: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for lengths or numbers of requests below 1, or an unknown metric."""
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths are {self.lengths}; give at least one, each at least 1")
        for name, least in {
            "min_history": 0, "max_requests": 1, "validation_length": 1, "validation_requests": 1,
            "validation_targets": 1,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        known = (*METRICS, *COUNTS)
        if self.metric not in known:
            raise ValueError(f"metric is {self.metric!r}; it must be one of {', '.join(known)}")
        if self.larger_is_better and self.metric in SMALLER_IS_BETTER:
            raise ValueError(
                f"a smaller {self.metric} is better: set larger_is_better=false beside it"
            )


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
