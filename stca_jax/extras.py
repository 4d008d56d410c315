"""What an installation may lack: a sentence with the command, not a traceback."""

from __future__ import annotations

import importlib.util
import sys


def require(extra: str, *modules: str) -> None:
    """Called by a package before it imports what an extra of the installation brings.

    Args:
      extra: That brings the modules.
      modules: Top-level names.

    Raises:
      ModuleNotFoundError: one is not installed; names it and the command. Below `python -m`, the
        process prints that and ends with 1 instead.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return
    message = f'needs {", ".join(missing)}, not installed: pip install -e ".[{extra}]"'
    if sys.argv[0] == "-m":  # the module that is to run has not been found yet
        sys.exit(f"error: {message}")
    raise ModuleNotFoundError(message, name=missing[0])
