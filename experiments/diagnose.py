"""What a model has learned: its terms, its calibration, and what each of its channels adds.

    python -m stca_jax.experiments.diagnose --workdir=DIR [--split=test] [--step=best|last|N]
        [--length=N]

prints, at one history length, the calibration by length of the users' histories, and AUC with each
channel of the model switched off at evaluation: parameters that read or make it are zero, which is
exactly what zeros in the channel give. On synthetic_interests also the regression of the model's
logits on the terms of the true function, beside their weights in the truth, and the ceilings.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from stca_jax.data.preparation import prepare
from stca_jax.data.synthetic_interests.truth import records_of, split_lifts, truth_of
from stca_jax.errors import UserError
from stca_jax.evaluation import metrics
from stca_jax.evaluation.best import read_best
from stca_jax.evaluation.diagnosis import calibration_rows, channels, term_rows
from stca_jax.evaluation.evaluator import evaluate_split, selection_limits
from stca_jax.evaluation.references.logistic import fit_logistic
from stca_jax.evaluation.tables import Row, format_table
from stca_jax.experiments import launch
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.planning import select_requests
from stca_jax.models.ranker import Ranker
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.train_step import Predictions
from stca_jax.workdir import load_workdir_config, restore_for_evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which requests.")
_STEP = flags.DEFINE_string("step", "best", "best, last, or the step of a checkpoint.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "History length; by default the config's longest.", lower_bound=1
)


def main() -> None:
    """Prints the tables."""
    workdir = launch.local_path("workdir", _WORKDIR.value)
    config = load_workdir_config(workdir)
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    length = _LENGTH.value or max(config.evaluation.lengths)
    program, state = restore_for_evaluation(config, dataset, workdir, _step(workdir))

    def predict(state: Any) -> Any:
        return evaluate_split(
            program, state, dataset, config.input, split=_SPLIT.value, length=length,
            **selection_limits(config.evaluation),
        )  # fmt: skip

    predictions = predict(state)
    label, logit, is_known = _first_task(predictions)
    print(f"{_SPLIT.value} split at length {length:,}, {len(label):,} targets, first task")
    requests = select_requests(
        dataset.index,
        config.input.for_evaluation(
            _SPLIT.value, length, **selection_limits(config.evaluation)
        ),
    )  # fmt: skip
    if config.dataset.startswith("synthetic_interests"):
        truth = truth_of(dataset)
        records = list(records_of(dataset, requests))
        lifts = np.concatenate([truth.lifts(record, length) for record in records])
        ids = np.concatenate(
            [np.repeat(record.request_id, np.diff(record.target_offset)) for record in records]
        )
        lifts = lifts[np.argsort(ids, kind="stable")]
        order = np.argsort(predictions.request_id, kind="stable")
        print("\n" + format_table(term_rows(logit[order], lifts, truth.names, truth.weights)))
        fitted = fit_logistic(*split_lifts(dataset, truth, "train", length))
        known = {
            "model": logit[order],
            "truth": (lifts @ truth.weights).astype(np.float32),
            "refitted": fitted.logit(lifts.astype(np.float32)),
        }
        ceilings = [{"of": n, "auc": metrics.auc(label[order], z)} for n, z in known.items()]
        print("\n" + format_table(ceilings))
    history = dict(zip(requests.request_id.tolist(), requests.history_end.tolist(), strict=True))
    events = np.array([history[i] for i in predictions.request_id[is_known].tolist()])
    print("\n" + format_table(calibration_rows(label, logit, np.minimum(events, length))))
    rows: list[Row] = [{"off": "nothing", "auc": metrics.auc(label, logit)}]
    ranker = nnx.eval_shape(lambda: Ranker(config.model, dataset.schema, rngs=nnx.Rngs(0)))
    for channel, changed in channels(state, ranker).items():
        label, logit, _ = _first_task(predict(changed))
        rows.append({"off": channel, "auc": metrics.auc(label, logit)})
    print("\n" + format_table(rows))


def _first_task(predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and logits of the targets that have a label of the first task, and which they are."""
    known = ~np.isnan(predictions.label[:, 0])
    return predictions.label[known, 0], predictions.logit[known, 0], known


def _step(workdir: pathlib.Path) -> int:
    steps = Checkpointer(workdir).steps()
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet")
    if _STEP.value.isdigit() and int(_STEP.value) in steps:
        return int(_STEP.value)
    if _STEP.value not in ("best", "last"):
        raise UserError(f"--step={_STEP.value}: give best, last or one of {steps}")
    best = read_best(workdir) if _STEP.value == "best" else None
    return best["step"] if best and best["step"] in steps else steps[-1]


if __name__ == "__main__":
    launch.run(main)
