"""Plants faults in a copy of the code, one at a time, and sees whether the named test notices.

    python tests/mutants.py [NAME ...]

Each mutant is one change of one place and runs one test, which must fail. Not a part of CI: it
takes minutes. Exit status 1 if a mutant survives, or if a place to change is no longer there.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A fault.

    Attributes:
      name: What the fault is.
      file: Where it is planted.
      old: Stands there once.
      new: Stands there instead.
      test: The test that must fail, as pytest takes it.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


_TRAINER = "tests/test_trainer.py::"
_STEP = "tests/training/test_train_step.py::"
_OPTIMIZER = "tests/training/test_optimizer.py::"
_MAY_CHANGE = "tests/test_workdir.py::test_what_does_not_change_the_learning_may_change"
_PROGRAM = "tests/test_experiment.py::test_program_has_the_seed_and_the_weighting_of_the_config"
_TASKS = "tests/evaluation/test_evaluator.py::test_each_task_is_scored_by_its_own_labels_and_logits"
_EXCLUSIVE = "tests/test_batch.py::test_exclusive_ranges_that_overlap_end_alike_at_one_time"
_SHORT = _TRAINER + "test_requests_of_short_histories_are_left_out_everywhere"
_AVERAGE = _STEP + "test_predictions_are_of_the_average"
_SKIPPED = _STEP + "test_skipped_step_changes_nothing"
_IDS = "tests/data/test_log_coverage.py::"
_LAYER = "tests/ops/test_kernels.py::test_tiles_of_a_layer_on_tpus"
_WHERE_READ = "test_tokens_are_encoded_where_they_are_read"
_HOPPER = "tests/ops/test_pallas_mosaic_gpu.py::"
_ENCODER = "tests/ops/test_encoder_kernels.py::"

MUTANTS = (
    Mutant("labels of the first task", "stca_jax/evaluation/evaluator.py",
           "predictions.label[known, k]", "predictions.label[known, 0]", _TASKS),
    Mutant("logits of the first task", "stca_jax/evaluation/evaluator.py",
           "predictions.logit[known, k]", "predictions.logit[known, 0]", _TASKS),
    Mutant("loss weighting not passed", "stca_jax/training/train_step.py",
           "LabelLoss(self.training.loss_weighting)", "LabelLoss()", _PROGRAM),
    Mutant("seed not passed", "stca_jax/experiment.py", "seed=config.seed,", "seed=0,", _PROGRAM),
    Mutant("no clipping", "stca_jax/training/optimizer.py",
           "optax.clip_by_global_norm(config.clip_norm)",
           "optax.clip_by_global_norm(1e30)",
           _OPTIMIZER + "test_gradients_beyond_the_norm_are_scaled_down"),
    Mutant("no weight decay", "stca_jax/training/optimizer.py",
           "_decay_matrices(config.weight_decay),", "_decay_matrices(0.0),",
           _OPTIMIZER + "test_weight_decay_is_of_matrices_only"),
    Mutant("weight decay of everything", "stca_jax/training/optimizer.py",
           "update + weight_decay * parameter if is_matrix(name, parameter) else update",
           "update + weight_decay * parameter",
           _OPTIMIZER + "test_weight_decay_is_of_matrices_only"),
    Mutant("warm-up not shortened", "stca_jax/training/optimizer.py",
           "min(config.warmup_steps, max(num_steps // 2, 1))", "config.warmup_steps",
           _OPTIMIZER + "test_warm_up_takes_at_most_half_of_a_short_run"),
    Mutant("larger is always better", "stca_jax/evaluation/best.py",
           "sign = 1 if criterion.larger_is_better else -1", "sign = 1",
           "tests/evaluation/test_best.py::test_direction_and_the_first_of_equal_ones"),
    Mutant("validation takes larger for better", "stca_jax/evaluation/validation.py",
           "            config.larger_is_better,\n", "            True,\n",
           _TRAINER + "test_best_checkpoint_survives_retention"),
    Mutant("values of other requests compared", "stca_jax/evaluation/best.py",
           "mark.get(n, v) == v for n, v in _columns(criterion).items()",
           "mark[n] == v for n, v in list(_columns(criterion).items())[:3]",
           "tests/evaluation/test_best.py::"
           "test_values_of_different_lengths_requests_and_metrics_are_not_compared"),
    Mutant("too few histories found at the first checkpoint", "stca_jax/evaluation/validation.py",
           "        select_requests(dataset.index, scored)\n", "",
           _TRAINER + "test_what_cannot_run_leaves_the_workdir_free"),
    Mutant("a failing reference ends all", "experiments/evaluate.py",
           "except Exception as error:  # the model is scored all the same",
           "except UserError as error:",
           "tests/experiments/test_evaluate.py::"
           "test_a_reference_that_fails_does_not_keep_the_model_from_being_scored"),
    Mutant("records decoded for every batch", "stca_jax/input/assembly.py",
           "RecordCache(dataset.record)", "RecordCache(dataset.record, 0)",
           "tests/input/test_pipeline.py::test_a_user_in_many_batches_is_decoded_once"),
    Mutant("signals handled in any thread", "stca_jax/training/signals.py",
           "if threading.current_thread() is threading.main_thread():", "if True:",
           _TRAINER + "test_a_thread_that_cannot_handle_signals_trains_too"),
    Mutant("last step counts as interrupted", "stca_jax/trainer.py",
           "                if is_over:\n                    stopped_by = None\n", "",
           _TRAINER + "test_a_signal_in_the_last_step_interrupts_nothing"),
    Mutant("an interrupted run is not due", "stca_jax/trainer.py",
           "is_saving = is_due(step) or stopped_by is not None", "is_saving = is_due(step)",
           _TRAINER + "test_signal_saves_a_checkpoint_and_the_run_goes_on"),
    Mutant("mesh may not change", "stca_jax/experiment.py", '    "mesh.",\n', "", _MAY_CHANGE),
    Mutant("optimizer may change", "stca_jax/experiment.py",
           '    "mesh.",\n', '    "mesh.",\n    "optimizer.",\n', _MAY_CHANGE),
    Mutant("ranges may end anywhere", "stca_jax/batch.py",
           "np.equal(*pairs(time)) & np.equal(*pairs(end))", "np.equal(*pairs(time))", _EXCLUSIVE),
    Mutant("ranges may be of any time", "stca_jax/batch.py",
           "np.equal(*pairs(time)) & np.equal(*pairs(end))", "np.equal(*pairs(end))", _EXCLUSIVE),
    Mutant("pieces of a request share a place", "stca_jax/input/planning.py",
           "draw(_SHUFFLE, pieces.first_target)", "draw(_SHUFFLE)",
           "tests/input/test_pipeline.py::test_pieces_of_one_request_are_spread_over_the_epoch"),
    Mutant("shares of a batch unbalanced", "stca_jax/input/assembly.py",
           "rows = [rows[i] for i in order[self._rows]]", "rows = rows[self._rows]",
           "tests/input/test_pipeline.py::test_processes_get_near_equal_tokens"),
    Mutant("no average in prediction", "stca_jax/training/train_step.py",
           "state.optimizer.average if self.training.ema_decay else state.dense", "state.dense",
           _AVERAGE),
    Mutant("average without warm-up", "stca_jax/training/averaging.py",
           "jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))", "decay", _AVERAGE),
    Mutant("skipped steps update parameters", "stca_jax/training/train_step.py",
           "jnp.where(diverged, old, new)", "new", _SKIPPED),
    Mutant("skipped steps update tables", "stca_jax/training/train_step.py",
           "jnp.where(diverged, 0, g)", "g", _SKIPPED),
    Mutant("skipped steps count", "stca_jax/training/train_step.py",
           "(jnp.where(diverged, 0, 1) if is_skipping else 1)", "1", _SKIPPED),
    Mutant("micro-batches read each other's rows", "stca_jax/training/train_step.py",
           "jax.tree.map(cut, (batch, places))",
           "(jax.tree.map(cut, batch), jax.tree.map(lambda x: cut(x)[::-1], places))",
           _STEP + "test_micro_batches_add_up_to_the_batch"),
    Mutant("mean of micro-batches' means", "stca_jax/training/train_step.py",
           "loss(inputs, total_weights[loss.name])", "loss(inputs, loss.total_weight(batch))",
           _STEP + "test_micro_batches_add_up_to_the_batch"),
    Mutant("evaluation of short histories", "stca_jax/evaluation/evaluator.py",
           "return {name: getattr(config, name) for name in names}",
           'return {name: getattr(config, name) for name in names} | {"min_history": 0}', _SHORT),
    Mutant("validation of short histories", "stca_jax/evaluation/evaluator.py",
           '        "min_history": config.min_history,\n', "", _SHORT),
    Mutant("NaN in configs", "stca_jax/config_form.py", "if math.isnan(value):", "if False:",
           "tests/test_experiment.py::test_nan_is_no_value_of_any_number"),
    Mutant("input left open after an error", "stca_jax/trainer.py",
           "contextlib.closing(batches),", "contextlib.nullcontext(),",
           _TRAINER + "test_an_error_closes_input_checkpointer_and_lock"),
    Mutant("checkpointer left open after an error", "stca_jax/training/checkpointing.py",
           "error is None or (isinstance(error, Exception) and jax.process_count() == 1)",
           "error is None", _TRAINER + "test_an_error_closes_input_checkpointer_and_lock"),
    Mutant("a second Ctrl-C is only remembered", "stca_jax/training/signals.py",
           "            raise KeyboardInterrupt\n", "            return\n",
           "tests/experiments/test_train.py::test_a_second_ctrl_c_stops_at_once"),
    Mutant("no lock", "stca_jax/workdir.py", "held.enter_context(lock)", "pass",
           "tests/experiments/test_train.py::"
           "test_of_two_trainings_in_one_workdir_the_second_is_refused"),
    Mutant("brackets in a workdir", "stca_jax/workdir.py", '_WILDCARDS = "*?[]\\\\"',
           '_WILDCARDS = "*?"', "tests/experiments/test_launch.py::"
           "test_a_work_directory_with_brackets_is_refused_before_it_is_made"),
    Mutant("old positions compared field by field", "stca_jax/input/pipeline.py",
           "{**{k: v for k, v in _DEFAULTS.items() if k in here}, **state[\"config\"]}",
           'state["config"]', "tests/input/test_pipeline.py::"
           "test_a_position_of_an_older_version_goes_on_where_that_would_have"),
    Mutant("soft counts of other candidates", "stca_jax/serving/soft_counts.py",
           "sharpness)[place])", "sharpness)[place[::-1]])",
           "tests/serving/test_soft_counts.py::test_sum_over_ids_is_that_over_events"),
    Mutant("soft counts not served", "stca_jax/serving/cache.py",
           "soft[u, :m] = model.soft_counts", "soft[u, :m] = 0 * model.soft_counts",
           "tests/serving/test_scorer.py::test_replayed_requests_score_as_evaluated"),
    Mutant("SQL offered that was not tried", "data/interaction_log/id_matching.py",
           "is_safe and (matched or 0) >= (best.share if best else share) + _GAIN", "best is None",
           _IDS + "test_ids_that_only_look_different_end_with_sql_that_mends_them"),
    Mutant("ids made one by a rule", "data/interaction_log/id_matching.py",
           "place < _SAFE or not (merged or lost)", "True",
           _IDS + "test_ids_that_no_rule_mends_say_so"),
    Mutant("decimals beside integers are floats", "data/interaction_log/columns.py",
           'if both <= {"integer", "decimal"}:', "if False:",
           "tests/data/test_interaction_log.py::test_equal_ids_of_different_types_are_one"),
    Mutant("what cannot be compared is text", "data/interaction_log/columns.py",
           "        return None\n    if both", "        return pa.string()\n    if both",
           "tests/data/test_interaction_log.py::test_types_that_cannot_be_compared_are_refused"),
    Mutant("sorted copies left by an error", "data/interaction_log/staging.py",
           "            self.discard()\n            raise", "            raise",
           "tests/data/test_leftovers.py::test_a_description_that_is_wrong_leaves_its_rejected_rows"),
    Mutant("sorted copies left of before", "data/interaction_log/staging.py",
           "shutil.rmtree(other)", "pass",
           "tests/data/test_leftovers.py::"
           "test_of_a_killed_log_described_otherwise_nothing_is_left"),
    Mutant("skip without a gradient on GPUs", "stca_jax/ops/encoder_triton.py",
           "d_x = d if static.skip else [", "d_x = [", _ENCODER + "test_values_and_gradients"),
    Mutant("skip without a gradient on TPUs", "stca_jax/ops/encoder_tpu.py",
           "(d_x + d_y if skip else d_x)", "d_x", _ENCODER + "test_values_and_gradients"),
    Mutant("padded columns normalised", "stca_jax/ops/encoder_kernels.py",
           "if offset > width:", "if False:", _ENCODER + "test_values_and_gradients"),
    Mutant("gradients of uncovered tokens", "stca_jax/ops/encoder_tpu.py",
           "jnp.where(mask > 0, x, 0)", "x", _ENCODER + "test_values_and_gradients"),
    Mutant("tiles of tokens taken for history tiles", "stca_jax/ops/tiles.py",
           "x[:, None] * tiling.history", "x[:, None] * tile",
           "tests/ops/test_kernels.py::test_layer_without_scores"),
    Mutant("a layer in two halves on TPUs", "stca_jax/ops/pallas_tpu.py",
           "if incoming is None:", "if True:",
           "tests/ops/test_kernels.py::test_gradients_of_encoded_tokens_are_not_stored"),
    Mutant("targets that do not read a tile on TPUs", "stca_jax/ops/attention_tpu.py",
           "jnp.clip(j, begin[n], jnp.maximum(end[n] - 1, begin[n]))", "begin[n]", _LAYER),
    Mutant("bands of history tiles taken for tokens on TPUs", "stca_jax/ops/attention_tpu.py",
           "last[target_tile] * history", "last[target_tile]", _LAYER),
    Mutant("tokens that no target reads on TPUs", "stca_jax/ops/attention_tpu.py",
           "refs.d_tokens[...] = jnp.zeros_like(refs.d_tokens)", "pass", _LAYER),
    Mutant("gradients of the tile before on TPUs", "stca_jax/ops/attention_tpu.py",
           "dtype)\n        summed[...] = jnp.zeros_like(summed)", "dtype)", _LAYER),
    Mutant("skip without a gradient on an H100", "stca_jax/ops/encoder_mosaic_gpu.py",
           "d if layer.skip else jnp.zeros_like(d)", "jnp.zeros_like(d)",
           _ENCODER + "test_values_and_gradients"),
    Mutant("padded columns normalised on an H100", "stca_jax/ops/encoder_mosaic_gpu.py",
           "if width < y.shape[1]:", "if False:", _ENCODER + "test_values_and_gradients"),
    Mutant("sums not rescaled on an H100", "stca_jax/ops/attention_mosaic_gpu.py",
           "summed = summed * along_rows(rescale, summed.shape)", "summed = summed * 1",
           _HOPPER + "test_shares_of_a_band"),
    Mutant("shares of tokens overlap on an H100", "stca_jax/ops/encoder_mosaic_gpu.py",
           "begin = share * most", "begin = share", _HOPPER + "test_shares_of_the_tokens"),
    Mutant("bands of history tiles taken for tokens' tiles", "stca_jax/ops/attention_triton.py",
           "-(-inputs.last * tiling.history // tile)", "inputs.last",
           _ENCODER + _WHERE_READ),
    Mutant("encoded tokens kept in the first tile", "stca_jax/ops/attention_triton.py",
           "ref[rows, p] = x", "ref[pl.ds(0, tile), p] = x", _ENCODER + _WHERE_READ),
    Mutant("encoded tokens of all rows in one on an H100",
           "stca_jax/ops/attention_mosaic_gpu.py",
           "pl.ds((j * tiles + i) * TILE, TILE)", "pl.ds(i * TILE, TILE)", _ENCODER + _WHERE_READ),
    Mutant("encoded tokens not kept on TPUs", "stca_jax/ops/attention_tpu.py",
           "ref[0, 0] = encoded", "pass", _ENCODER + _WHERE_READ),
    Mutant("shares of tokens overlap", "stca_jax/ops/encoder_triton.py",
           "begin = pl.program_id(1) * most", "begin = pl.program_id(1)",
           _ENCODER + "test_shares_of_the_tokens"),
)  # fmt: skip


def is_killed(mutant: Mutant, folder: pathlib.Path) -> bool:
    """Whether the test fails in a copy of the repository with the fault.

    Raises:
      ValueError: what is to be replaced does not stand there once.
    """
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times")
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return not passes(folder, mutant.test)
    finally:
        path.write_text(text)


def passes(folder: pathlib.Path, *tests: str) -> bool:
    """Runs tests; that one is not found is an error."""
    # Without bytecode: a file may change twice within the second that it is told apart by.
    options = {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=folder, env=os.environ | options, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if finished.returncode not in (0, 1):
        raise ValueError(f"{' '.join(tests)} cannot be run: {finished.stdout[-2_000:]}")
    return finished.returncode == 0


def main(names: list[str]) -> int:
    """Tries the mutants of some names, or all."""
    chosen = [m for m in MUTANTS if not names or m.name in names]
    survived = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "site")
        shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=ignored)
        if not passes(folder, *dict.fromkeys(m.test for m in chosen)):
            raise ValueError("a test fails as the code stands; mend that first")
        for mutant in chosen:
            killed = is_killed(mutant, folder)
            print(f"{'killed' if killed else 'SURVIVED'}: {mutant.name}", flush=True)
            if not killed:
                survived.append(mutant)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants killed")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
