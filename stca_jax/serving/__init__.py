"""Serving of exported models: exact, cached, from one folder.

    model = ServingModel.load("/exports/1")                 hashes and golden requests checked
    scorer = Scorer(model, SqliteHistories("users.sqlite"))
    scorer.append("user 7", Events(time, {"item": …}))      stored, then written into the cache
    scorer.score("user 7", {"item": candidates}, time=now)  -> {task: float32[m]}

Needs jax, numpy, jaxtyping, safetensors and flatbuffers (which jax.export reads with), and nothing
that training needs. See docs/serving.md.
"""

from stca_jax.extras import require

require("serving", "flatbuffers", "safetensors")

from stca_jax.serving.events import Events
from stca_jax.serving.histories import HistoryStore
from stca_jax.serving.model import ServingModel
from stca_jax.serving.score_request import ScoreRequest
from stca_jax.serving.scorer import Scorer
from stca_jax.serving.sqlite_histories import SqliteHistories

__all__ = [
    "Events",
    "HistoryStore",
    "ScoreRequest",
    "Scorer",
    "ServingModel",
    "SqliteHistories",
]
