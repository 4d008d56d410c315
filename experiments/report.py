"""Draws one page about one or more runs.

python -m stca_jax.experiments.report --workdir=/path/to/run [--workdir=/path/to/another ...]
    --output=report.html

The page holds quality by history length (beside the references, where an evaluation wrote them), by
step and by training cost, calibration, throughput and the config. It is one HTML file that loads
nothing; the charts also lie as PNG in a directory of the same name. Runs that differ only in their
seeds are one line, with bars of one standard deviation. It reads what `train` and `evaluate` wrote,
at any time.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from stca_jax.evaluation.report.page import write_report
from stca_jax.evaluation.report.runs import load_run
from stca_jax.experiments import launch

_WORKDIRS = flags.DEFINE_multi_string("workdir", None, "Directory of a run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The page: a file ending in .html.", required=True)


def main() -> None:
    """Writes the page."""
    output = launch.local_path("output", _OUTPUT.value)
    workdirs = [launch.local_path("workdirs", workdir).absolute() for workdir in _WORKDIRS.value]
    runs = [load_run(*named) for named in zip(workdirs, _names(workdirs), strict=True)]
    with launch.working("Drawing"):
        page, *charts = write_report(runs, output)
    print(f"written to {page}, and {len(charts)} charts to {page.with_suffix('')}")


def _names(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, max(len(path.parts) for path in workdirs)):
        names = ["/".join(path.parts[-length:]) for path in workdirs]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in workdirs]


if __name__ == "__main__":
    launch.run(main)
