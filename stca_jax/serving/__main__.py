"""Serves an exported model over HTTP.

python -m stca_jax.serving --model=DIR [--port=8080] [--histories=FILE.sqlite]

SIGTERM answers what has come and ends; SIGHUP goes on with the export that --model names then,
once it has passed its golden requests. The interface: docs/serving.md.

Exit status: 0 ended by a signal, 1 an error.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stca_jax.errors import UserError

if TYPE_CHECKING:
    from stca_jax.serving import HistoryStore

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
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
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
    import jax  # only now: --help is quick

    from stca_jax.serving import Scorer, ServingModel
    from stca_jax.serving.server.app import ServerOptions
    from stca_jax.serving.server.running import Operation, run
    from stca_jax.serving.server.telemetry import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log = logging.getLogger("stca_jax.serving")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    listening = _listen(options.host, options.port)  # a taken port is said before the model loads
    model = ServingModel.load(pathlib.Path(options.model).resolve(), cache=options.cache)
    scorer = Scorer(
        model,
        _histories(options.histories, options.sync),
        max_bytes=options.cache_bytes,
        encoded=options.encoded or None,
    )
    sizes = _sizes(options.warm_up)
    scorer.warm_up(sizes)
    host, port = listening.getsockname()[:2]
    log.info("listening", extra={"fields": {"host": host, "port": port}})
    settings = ServerOptions(
        name=options.name,
        token=os.environ.get(TOKEN) or None,
        max_body_bytes=options.max_body_bytes,
        deadline_seconds=options.deadline,
        max_waiting=options.max_waiting,
    )
    operation = Operation(pathlib.Path(options.model), sizes, options.drain)
    run(scorer, settings, operation, [listening])
    return 0


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


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at --host={host} --port={port}: {error}") from None
    return listening


if __name__ == "__main__":
    sys.exit(main())
