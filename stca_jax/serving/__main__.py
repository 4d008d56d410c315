"""Serves an exported model over HTTP.

python -m stca_jax.serving --model=DIR [--port=8080] [--histories=FILE.sqlite] [--workers=N]

SIGTERM answers what has come and ends; SIGHUP goes on with the export that --model names then,
once it has passed its golden requests. The interface: docs/serving.md.

Exit status: 0 ended by a signal, 1 an error.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pathlib
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stca_jax.errors import UserError, first_line

if TYPE_CHECKING:
    from stca_jax.serving import HistoryStore, Scorer
    from stca_jax.serving.server.app import ServerOptions

TOKEN = "STCA_SERVING_TOKEN"


def main() -> int:
    """Loads, checks and warms up, then serves."""
    options = _parse(sys.argv[1:])
    try:
        return _serve(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stca_jax.serving",
        description=(__doc__ or "").partition("\n\npython")[0],
        epilog=f"A bearer token that requests must carry is read from the environment, {TOKEN}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made_by = "folder of python -m stca_jax.experiments.export"
    parser.add_argument("--model", required=True, help=made_by)
    parser.add_argument("--name", default="stca", help="of the model, in paths under /v2")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at, or unix:PATH")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, each with its users and a cache"
    )
    parser.add_argument(
        "--histories",
        default=":memory:",
        help="SQLite file, or redis://HOST:PORT; :memory: forgets at the end",
    )
    parser.add_argument("--sync", action="store_true", help="each append survives a loss of power")
    parser.add_argument("--cache", default="keys_values", help="keys_values, tokens or int8")
    parser.add_argument("--cache_bytes", type=int, default=1 << 30, help="of cached users")
    parser.add_argument("--encoded", action="store_true", help="take ids as trained")
    parser.add_argument("--max_body_bytes", type=int, default=8 << 20, help="else 413")
    parser.add_argument("--max_waiting", type=int, default=256, help="requests; else 503")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds of waiting; else 504")
    parser.add_argument("--drain", type=float, default=0.0, help="seconds unready after SIGTERM")
    parser.add_argument(
        "--warm_up",
        default="",
        help="numbers of candidates to compile for before it is ready, such as 1,100; all sizes",
    )
    parser.add_argument(
        "--compilation_cache", help="folder that keeps compiled programs from start to start"
    )
    return parser.parse_args(arguments)


def _serve(options: argparse.Namespace) -> int:
    from stca_jax.serving.server.app import ServerOptions
    from stca_jax.serving.server.supervision import WORKER, end_with_parent
    from stca_jax.serving.server.telemetry import JsonLines

    worker = os.environ.get(WORKER)
    if worker is not None:
        end_with_parent()
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(**({} if worker is None else {"worker": worker})))
    log = logging.getLogger("stca_jax.serving")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    sizes = _sizes(options.warm_up)
    settings = ServerOptions(
        name=options.name,
        token=os.environ.get(TOKEN) or None,
        max_body_bytes=options.max_body_bytes,
        deadline_seconds=options.deadline,
        max_waiting=options.max_waiting,
    )
    _allow_connections()
    listening = listen(options.host, options.port)  # a taken port is said before the model loads
    model = pathlib.Path(options.model)
    if options.workers < 1:
        raise UserError(f"--workers={options.workers}: give 1 or more")
    if options.workers > 1:
        _serve_by_workers(options, settings, listening)
        return 0

    from stca_jax.serving.server.running import Operation, run

    scorer = _open(options)
    scorer.warm_up(sizes)
    log.info("listening", extra={"fields": _address(listening)})
    run(scorer, settings, Operation(model, sizes, options.drain, _served_file()), [listening])
    return 0


def _serve_by_workers(
    options: argparse.Namespace, settings: ServerOptions, listening: socket.socket
) -> None:
    from stca_jax.serving.server.front import run_front

    if options.histories == ":memory:":
        raise UserError(
            f"--workers={options.workers} needs --histories=FILE.sqlite or redis://HOST:PORT: a "
            "worker that is started again would have forgotten its users"
        )
    logging.getLogger("stca_jax.serving").info("listening", extra={"fields": _address(listening)})
    command = [sys.executable, "-m", "stca_jax.serving", *sys.argv[1:]]
    run_front(command, options.workers, settings, options.drain, listening)


def _open(options: argparse.Namespace) -> Scorer:
    """The scorer of --model or, of a worker that is started again, of the export before."""
    import jax  # only now: the front process needs no device

    from stca_jax.serving import Scorer, ServingModel
    from stca_jax.serving.threads import compute_with_one_thread

    compute_with_one_thread()
    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

    def scorer_of(path: str) -> Scorer:
        model = ServingModel.load(pathlib.Path(path).resolve(), cache=options.cache)
        histories = _histories(options.histories, options.sync)
        encoded = options.encoded or None
        return Scorer(model, histories, max_bytes=options.cache_bytes, encoded=encoded)

    served = _served_file()
    try:
        return scorer_of(options.model)
    except UserError as error:
        if served is None or not served.exists():
            raise
        logging.getLogger("stca_jax.serving").error(
            "the export cannot serve; the one before does",
            extra={"fields": {"reason": first_line(error)}},
        )
        return scorer_of(os.fsdecode(served.read_bytes()))


def _served_file() -> pathlib.Path | None:
    """Where this process, if it is a worker, notes the export that serves."""
    from stca_jax.serving.server.supervision import SERVED

    name = os.environ.get(SERVED)
    return None if name is None else pathlib.Path(name)


def _allow_connections() -> None:
    """As many open sockets as the system lets this process have."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where there are no limits
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _sizes(text: str) -> Sequence[int]:
    from stca_jax.serving.model import BUCKETS, MAX_TARGETS

    try:
        sizes = [int(size) for size in text.split(",")] if text else list(BUCKETS)
    except ValueError:
        sizes = [0]
    if not all(1 <= size <= MAX_TARGETS for size in sizes):
        raise UserError(f"--warm_up={text}: give numbers from 1 to {MAX_TARGETS:,}, with commas")
    return sizes


def _histories(name: str, sync: bool) -> HistoryStore:
    from stca_jax.serving import SqliteHistories

    scheme, is_address, _ = name.partition("://")
    if not is_address:
        return SqliteHistories(name, sync=sync)
    if scheme not in ("redis", "rediss", "unix"):
        raise UserError(f"--histories={name}: give a file, or redis://, rediss:// or unix://")
    try:
        from stca_jax.serving.redis_histories import RedisHistories
    except ModuleNotFoundError as error:
        raise UserError(f'{error}: pip install -e ".[redis]"') from None
    return RedisHistories(name)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
      UserError: there is no such address, or it is taken.
    """
    address: Any = (host, port)
    # Only of a socket that names its protocol does asyncio send every write at once; else a body
    # that follows its headers waits until the client has acknowledged these, up to 40 ms.
    protocol = socket.IPPROTO_TCP
    try:
        if host.startswith("unix:"):
            family, address, protocol = socket.AF_UNIX, host.removeprefix("unix:"), 0
        else:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at --host={host} --port={port}: {error}") from None
    return listening


def _address(listening: socket.socket) -> dict[str, Any]:
    name = listening.getsockname()
    return {"path": name} if isinstance(name, str) else {"host": name[0], "port": name[1]}


if __name__ == "__main__":
    sys.exit(main())
