"""Runs the steps of preparing a dataset: here, or as Apache Beam pipelines on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tqdm import tqdm

from stca_jax.errors import UserError

Runner = Callable[[str, Callable[[int], None], int], None]
"""Calls a function with 0, 1, … count - 1, in any order; its first argument says what for.

The function leaves its results in files, and does nothing for those that are there already.
"""


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
      UserError: Apache Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise UserError(f'needs the package {error.name}: pip install -e ".[beam]"') from error

    def run(what: str, function: Callable[[int], None], count: int) -> None:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            _ = (
                pipeline
                | f"{what}: list" >> beam.Create(range(count))
                | f"{what}: spread" >> beam.Reshuffle()
                | what >> beam.Map(function)
            )

    return run
