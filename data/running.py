"""Runs the steps of preparing a dataset: here, or as Apache Beam pipelines on a cluster."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from tqdm import tqdm

from stca_jax.errors import UserError, first_line

Runner = Callable[[str, Callable[[int], None], int], None]
"""Calls a function with 0, 1, … count - 1, in any order; its first argument says what for.

The function leaves its results in files, and does nothing for those that are there already.
"""


# A pipeline's error has the text of a worker's somewhere within its own.
_WORKER_ERROR = "<stca_jax>{}</stca_jax>"
_IN_TEXT = re.compile(_WORKER_ERROR.format("(.*?)"), re.DOTALL)


def run_here(what: str, function: Callable[[int], None], count: int) -> None:
    """One after the other, in this process."""
    for index in tqdm(range(count), desc=what, unit="step", disable=None if count > 1 else True):
        function(index)


def beam_runner(options: Sequence[str]) -> Runner:
    """Each step as a Beam pipeline.

    Args:
      options: Of Beam, such as "--runner=FlinkRunner".  Workers must see the log and the data
        folder under the same paths as this process.

    Raises:
      UserError: Apache Beam is not installed, or does not know an option.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise UserError(f'needs the package {error.name}: pip install -e ".[beam]"') from error

    def run(what: str, function: Callable[[int], None], count: int) -> None:
        step = functools.partial(_step, function)
        try:
            with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
                _ = (
                    pipeline
                    | f"{what}: list" >> beam.Create(range(count))
                    | f"{what}: spread" >> beam.Reshuffle()
                    | what >> beam.Map(step)
                )
        except Exception as error:  # of any kind, by runner
            if found := _IN_TEXT.search(str(error)):
                raise UserError(found[1]) from error
            raise UserError(
                f"{what}: the Beam pipeline with {' '.join(options)} failed: {first_line(error)}"
            ) from error

    return run


def _step(function: Callable[[int], None], index: int) -> None:
    """Runs a step in a worker, and marks the text of errors that are the user's to mend."""
    try:
        function(index)
    except (UserError, OSError) as error:
        raise UserError(_WORKER_ERROR.format(error)) from error
