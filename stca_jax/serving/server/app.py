"""The HTTP interface: plain JSON under /v1, the Open Inference Protocol under /v2.

    POST   /v1/users/ID/events   {"time": […], "features": {…}, "ids": […]}   append
    PUT    /v1/users/ID/events   the same: give events of those ids other features
    POST   /v1/users/ID/score    {"targets": {…}, "request": {…}, "time": …}  -> probabilities
    DELETE /v1/users/ID          forget the user
    POST   /v2/models/NAME/infer see `protocol`
    GET    /v2/health/live, /v2/health/ready, /v2, /v2/models/NAME[/ready], /metrics

Every error is {"error": one sentence}: 400 bad input, 401 no token, 404 no such path, 413 too
large, 503 busy or without its store, 504 too late.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hmac
import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from stca_jax.errors import UserError, first_line
from stca_jax.serving.events import Events
from stca_jax.serving.model import MAX_TARGETS
from stca_jax.serving.score_request import ScoreRequest
from stca_jax.serving.server import protocol
from stca_jax.serving.server.answers import RETRY, error_answer, json_answer, read_body
from stca_jax.serving.server.telemetry import CONTENT_TYPE, Telemetry
from stca_jax.serving.server.worker import BusyError, LateError, Worker

_log = logging.getLogger("stca_jax.serving")
_LONGEST_USER = 512  # characters

Handler = Callable[[Request], Awaitable[Response]]


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What an operator may set.

    Attributes:
      name: Of the model, in the paths under /v2.
      token: Bearer token that every request but those for health needs; None needs none.
      max_body_bytes: Larger bodies are refused.
      deadline_seconds: A request whose turn has not come by then is refused.
      max_waiting: Requests that may wait.
    """

    name: str = "stca"
    token: str | None = None
    max_body_bytes: int = 8 << 20
    deadline_seconds: float = 1.0
    max_waiting: int = 256


class Server:
    """The application around a worker.

    Attributes:
      app: For uvicorn.
      scorer: What answers.
      telemetry: What it tells an operator.
      is_ready: Whether new requests should come; false while it ends.
    """

    def __init__(self, worker: Worker, telemetry: Telemetry, options: ServerOptions):
        """Nothing is listened to yet."""
        self._worker = worker
        self.scorer = worker.scorer
        self.telemetry = telemetry
        self._options = options
        self.is_ready = True
        model = f"/v2/models/{options.name}"
        self.app = Starlette(
            routes=[
                self._route("/v1/users/{user:path}/events", "append", self._append, "POST"),
                self._route("/v1/users/{user:path}/events", "update", self._update, "PUT"),
                self._route("/v1/users/{user:path}/score", "score", self._score, "POST"),
                self._route("/v1/users/{user:path}", "forget", self._forget, "DELETE"),
                self._route(f"{model}/infer", "infer", self._infer, "POST"),
                self._route(model, "metadata", self._metadata, "GET"),
                self._route(f"{model}/ready", "health", self._ready, "GET"),
                self._route("/v2", "metadata", self._about, "GET"),
                self._route("/v2/health/ready", "health", self._ready, "GET"),
                self._route("/v2/health/live", "health", self._live, "GET"),
                self._route("/metrics", "metrics", self._metrics, "GET"),
            ],
            exception_handlers={HTTPException: _http_error},
        )

    def _route(self, path: str, operation: str, handler: Handler, method: str) -> Route:
        @functools.wraps(handler)
        async def answer(request: Request) -> Response:
            started = time.monotonic()
            response = await self._answer(operation, handler, request)
            seconds = time.monotonic() - started
            self.telemetry.answered(operation, response.status_code, seconds)
            if response.status_code >= 500:
                fields = {
                    "operation": operation,
                    "status": response.status_code,
                    "seconds": seconds,
                }
                _log.warning("request failed", extra={"fields": fields})
            return response

        return Route(path, answer, methods=[method])

    async def _answer(self, operation: str, handler: Handler, request: Request) -> Response:
        if operation != "health" and not self._is_allowed(request):
            return error_answer(401, "a bearer token is needed", {"www-authenticate": "Bearer"})
        try:
            return await handler(request)
        except HTTPException as error:
            return error_answer(error.status_code, error.detail)
        except ClientDisconnect:
            return Response(status_code=499)
        except UserError as error:
            return error_answer(400, str(error))
        except BusyError:
            return error_answer(503, f"{self._options.max_waiting} requests wait already", RETRY)
        except LateError:
            seconds = self._options.deadline_seconds
            return error_answer(504, f"its turn had not come after {seconds:g} seconds")
        except OSError as error:
            return error_answer(503, f"the store of histories fails: {first_line(error)}", RETRY)
        except Exception:
            _log.exception("request failed", extra={"fields": {"operation": operation}})
            return error_answer(500, "the server failed; its log says why")

    def _is_allowed(self, request: Request) -> bool:
        if self._options.token is None:
            return True
        given = request.headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self._options.token}".encode())

    async def _append(self, request: Request) -> Response:
        user, events = _user(request), _events(await self._json(request))
        return json_answer({"appended": await self._do(lambda: self.scorer.append(user, events))})

    async def _update(self, request: Request) -> Response:
        user, events = _user(request), _events(await self._json(request))
        await self._do(lambda: self.scorer.update(user, events))
        return json_answer({"updated": len(events)})

    async def _forget(self, request: Request) -> Response:
        user = _user(request)
        return json_answer({"deleted": await self._do(lambda: self.scorer.forget(user))})

    async def _score(self, request: Request) -> Response:
        user, body = _user(request), await self._json(request)
        _check_names(body, {"targets": dict, "request": dict, "time": (int, float)}, ("targets",))
        scored = await self._scored(
            ScoreRequest(user, body["targets"], body.get("request") or {}, body.get("time"))
        )
        version = self.scorer.model.info.version
        probabilities = {task: np.ascontiguousarray(v) for task, v in scored.items()}
        return json_answer({"probabilities": probabilities, "model_version": version})

    async def _infer(self, request: Request) -> Response:
        body = await self._body(request)
        asked, header = protocol.read_request(body, request.headers.get(protocol.HEADER_LENGTH))
        _check_user(asked.user)
        scored = await self._scored(asked)
        version = self.scorer.model.info.version
        content, headers = protocol.write_answer(header, scored, self._options.name, version)
        return Response(content, headers=headers)

    async def _scored(self, request: ScoreRequest) -> Mapping[str, np.ndarray]:
        for name, values in request.targets.items():
            if not isinstance(values, list | np.ndarray):
                raise UserError(f"targets {name!r} is {values!r}; give a list, a value a candidate")
            if len(values) > MAX_TARGETS:
                raise HTTPException(413, f"{len(values):,} targets; at most {MAX_TARGETS:,}")
        scored = await self._do(request)
        if isinstance(scored, UserError):
            raise scored
        result: Mapping[str, np.ndarray] = scored
        return result

    async def _do(self, work: ScoreRequest | Callable[[], Any]) -> Any:
        return await self._worker.do(work, self._options.deadline_seconds)

    async def _metadata(self, request: Request) -> Response:
        return json_answer(protocol.metadata(self.scorer.model, self._options.name))

    async def _about(self, request: Request) -> Response:
        version = importlib.metadata.version("stca-jax")
        extensions = ["binary_tensor_data"]
        return json_answer({"name": "stca_jax", "version": version, "extensions": extensions})

    async def _live(self, request: Request) -> Response:
        return json_answer({"live": True})

    async def _ready(self, request: Request) -> Response:
        return json_answer({"ready": self.is_ready}, 200 if self.is_ready else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.telemetry.text(), headers={"content-type": CONTENT_TYPE})

    async def _json(self, request: Request) -> dict[str, Any]:
        try:
            body = orjson.loads(await self._body(request))
        except orjson.JSONDecodeError as error:
            raise UserError(f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        return body

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._options.max_body_bytes)


def _events(body: Mapping[str, Any]) -> Events:
    _check_names(body, {"time": list, "features": dict, "ids": list}, ("time", "features"))
    for name, values in body["features"].items():
        if not isinstance(values, list):
            raise UserError(f"feature {name!r} is {values!r}; give a list, one value an event")
    return Events(np.asarray(body["time"]), body["features"], body.get("ids"))


def _check_names(
    body: Mapping[str, Any], kinds: Mapping[str, Any], needed: tuple[str, ...]
) -> None:
    for name, value in body.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(kinds)}"
            raise UserError(f"the body has {name!r}; {hint}")
        if value is not None and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
            kind = {list: "a list", dict: "an object"}.get(kinds[name], "a number")
            raise UserError(f"{name!r} is {value!r}; give {kind}")
    for name in needed:
        if body.get(name) is None:
            raise UserError(f"the body lacks {name!r}")


def _user(request: Request) -> str:
    user: str = request.path_params["user"]
    _check_user(user)
    return user


def _check_user(user: str) -> None:
    if not 0 < len(user) <= _LONGEST_USER:
        raise UserError(f"the user's id has {len(user)} characters; give 1 to {_LONGEST_USER}")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_answer(error.status_code, error.detail, error.headers)
