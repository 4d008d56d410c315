"""The scorer in Ray Serve: replicas by example, each with its users.

cd docs/deploy && serve run ray_serve:app

Each replica is a deployment of its own, so that the ingress can send a user always to the same one.
"""

import hashlib
import os

from ray import serve
from starlette.requests import Request

from stca_jax.serving import Events, Scorer, ServingModel
from stca_jax.serving.redis_histories import RedisHistories

REPLICAS = int(os.environ.get("STCA_REPLICAS", "2"))


@serve.deployment(
    ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {"PJRT_NPROC": "1"}}}
)
class Replica:
    """One scorer."""

    def __init__(self, model: str, histories: str):
        """Checks the golden requests."""
        self.scorer = Scorer(ServingModel.load(model), RedisHistories(histories))
        self.scorer.warm_up()

    def append(self, user: str, body: dict) -> int:
        """As POST /v1/users/ID/events."""
        return self.scorer.append(user, Events(body["time"], body["features"], body.get("ids")))

    def score(self, user: str, body: dict) -> dict:
        """As POST /v1/users/ID/score."""
        scored = self.scorer.score(user, body["targets"], body.get("request"), body.get("time"))
        return {task: values.tolist() for task, values in scored.items()}


@serve.deployment
class Ingress:
    """Sends a user to the user's replica."""

    def __init__(self, *replicas):
        """Handles of the replicas."""
        self.replicas = replicas

    async def __call__(self, request: Request) -> dict:
        """/append?user=ID and /score?user=ID."""
        user, body = request.query_params["user"], await request.json()
        digest = hashlib.blake2b(user.encode(), digest_size=8).digest()
        replica = self.replicas[int.from_bytes(digest) % len(self.replicas)]
        method = replica.append if request.url.path.endswith("append") else replica.score
        return {"result": await method.remote(user, body)}


app = Ingress.bind(
    *(
        Replica.options(name=f"replica_{k}").bind(
            os.environ.get("STCA_MODEL", "/models/current"),
            os.environ.get("STCA_HISTORIES", "redis://localhost:6379"),
        )
        for k in range(REPLICAS)
    )
)
