"""The programs of an exported model: what a server runs, traced once for every platform and size.

Weights are arguments. Rows of embedding tables are looked up on the host, so that tables may be of
any size: a program gets the features of an event, a candidate or a request side by side, embedded,
in the order of `PackedFeatures`. Nothing asks which platform traces: what differs between platforms
is chosen when a program is lowered (`lax.platform_dependent`).

    write_page  512 events into all slots of a page         append  events into slots anywhere
    score_few, score, score_tiles    candidates against pages, for M <= 32, <= 128, and 128 a
    rows/LxM    of a model that is served uncached: M candidates against L events, all in one
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export
from jaxtyping import Array, Float, Int

from stca_jax.batch import empty_batch
from stca_jax.export.caches import Cache, PagedHistory, Pool, make_caches
from stca_jax.models.ranker import Candidates, Ranker, RankerConfig
from stca_jax.models.sequence import HistoryReader, SequenceInput
from stca_jax.models.stca import Stca, StcaConfig
from stca_jax.ops.match import MatchStatistics
from stca_jax.ops.paged import PAGE, TARGET_TILE, Pages
from stca_jax.ops.sharded import assume_platform
from stca_jax.ranges import SharedRanges
from stca_jax.schema import Schema
from stca_jax.training.state import merge_ranker, split_ranker

PLATFORMS = ("cpu", "cuda", "tpu")
FEW_TARGETS = 32  # at most so many read encoded tokens in the absorbed order
Weights = Mapping[str, Array]  # dense parameters by path


class PackedFeatures(NamedTuple):
    """Features of a level, side by side in one array, as its last axis.

    Attributes:
      names: In their order.
      widths: Columns of each: an embedding's, or one number.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]

    def unpack(self, packed: Float[Array, "*N W"]) -> dict[str, Float[Array, "*N width"]]:
        """Each feature's columns."""
        ends = [0, *itertools.accumulate(self.widths)]
        return {
            name: packed[..., start:end]
            for name, start, end in zip(self.names, ends, ends[1:], strict=False)
        }


class ScoreInputs(NamedTuple):
    """What a request brings.

    Attributes:
      now: Its time.
      target: Packed features of the candidates.
      request: Packed features of the request.
      matches: Count, age of the latest in seconds, and decayed counts, of each field of the match
        channel; of width 0 without one.
      soft: Soft counts of the fields that have them; None without any.
    """

    now: Int[Array, " U"]
    target: Float[Array, "U M W"]
    request: Float[Array, "U V"]
    matches: Float[Array, "U M F stats"]
    soft: Float[Array, "U M S"] | None = None


@dataclasses.dataclass(frozen=True)
class ScoreProgram:
    """A program that scores.

    Attributes:
      name: Of its file.
      most: Most targets that it takes.
      multiple: Of what their number must be a multiple.
    """

    name: str
    most: int | None
    multiple: int


SCORE_PROGRAMS = (
    ScoreProgram("score_few", FEW_TARGETS, 1),
    ScoreProgram("score", TARGET_TILE, 1),
    ScoreProgram("score_tiles", None, TARGET_TILE),
)
ROW_TARGETS = (16, 128, 1_024, 2_048)  # targets of the programs of a model that is served uncached
SHORT_ROW = 1_024  # events of half of them; the others take max_history


class ServedRanker:
    """A ranker as functions of its weights and of packed features.

    Attributes:
      history: Packed features of events.
      target: Of candidates.
      request: Of requests.
      match_fields: Fields of the match channel; empty without one.
      decay_seconds: Its time constants.
      soft_fields: Fields with soft counts.
    """

    def __init__(self, ranker: Ranker):
        """Args: the model, which may be abstract; its tables are not read."""
        graph, self._abstract_dense, tables = split_ranker(ranker)
        self._graph = graph
        self._tables = {name: rows.shape[1] for name, rows in tables.items()}
        self._config, self._schema = ranker.config, ranker.schema
        self.history = self._packed(ranker, ranker.history_names)
        self.target = self._packed(ranker, ranker.target_names)
        self.request = self._packed(ranker, ranker.schema.request)
        channel = ranker.match_channel
        self.match_fields = channel.fields if channel else ()
        self.decay_seconds = channel.decay_seconds if channel else ()
        self.soft_fields = channel.soft_fields if channel else ()
        sequence = ranker.config.sequence
        self.caches = self._caches(ranker) if sequence.can_cache_history else {}

    @property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the weights."""
        return {
            name: jax.ShapeDtypeStruct(w.shape, w.dtype)
            for name, w in flatten(self._abstract_dense).items()
        }

    def cache_programs(self, cache_name: str) -> dict[str, Callable[..., Any]]:
        """Functions of a cached model, by the name of their program."""

        def cache_of(weights: Weights, is_few: bool) -> tuple[Ranker, Cache]:
            ranker = self._ranker(weights)
            few, many = self._caches(ranker)[cache_name]
            return ranker, few if is_few else many

        def tokens(ranker: Ranker, history: Array) -> Array:
            return ranker.encode_history({}, self.history.unpack(history))

        def write_page(
            weights: Weights,
            pool: Pool,
            history: Float[Array, "S W"],
            time: Int[Array, " S"],
            page: Int[Array, ""],
        ) -> Pool:
            ranker, cache = cache_of(weights, False)
            return cache.write_page(pool, tokens(ranker, history), time, page)

        def append(
            weights: Weights,
            pool: Pool,
            history: Float[Array, "T W"],
            places: Int[Array, "3 T"],
            count: Int[Array, ""],
        ) -> Pool:
            ranker, cache = cache_of(weights, False)
            time, page, slot = places
            return cache.write(pool, tokens(ranker, history), time, (page, slot), count)

        def score(is_few: bool) -> Callable[..., Any]:
            def scores(
                weights: Weights, pool: Pool, where: tuple[Array, ...], inputs: tuple[Array, ...]
            ) -> Float[Array, "U M tasks"]:
                requests = ScoreInputs(*inputs)
                ranker, cache = cache_of(weights, is_few)
                num_targets = requests.target.shape[1]
                history = PagedHistory(cache, pool, Pages(*where), requests.now, num_targets)

                def read(targets: Array) -> Any:
                    return cache.stca.read(targets, history)

                return self._score(ranker, read, requests, history.num_events)

            return scores

        scores = {program.name: score(program is SCORE_PROGRAMS[0]) for program in SCORE_PROGRAMS}
        return {"write_page": write_page, "append": append, **scores}

    def score_rows(
        self,
        weights: Weights,
        history: Float[Array, "U L W"],
        time: Int[Array, "U L"],
        num_events: Int[Array, " U"],
        inputs: tuple[Array, ...],
    ) -> Float[Array, "U M tasks"]:
        """Scores candidates against whole histories, oldest event first: nothing is cached.

        Args:
          weights: Dense parameters.
          history: Packed features of the events.
          time: Of the events.
          num_events: Of each user; what follows may be anything.
          inputs: The fields of `ScoreInputs`.
        """
        U, L, _ = history.shape
        requests = ScoreInputs(*inputs)
        M = requests.target.shape[1]

        def of_targets(x: Array) -> Array:
            return jnp.broadcast_to(x[:, None], (U, M))

        ranges = SharedRanges(of_targets(jnp.zeros_like(num_events)), of_targets(num_events))
        batch = empty_batch(self._schema, 1, 1, 1, shared_history=False).replace(
            history_time=time,
            request_time=of_targets(requests.now),
            history_start=ranges.start,
            history_end=ranges.end,
            target_mask=jnp.ones((U, M), bool),
        )

        # XLA's tiles on every platform: kernels of one cannot be lowered beside the others'.
        with assume_platform("cpu"):
            ranker = self._ranker(weights)
            embedded = self.history.unpack(history)
            tokens = ranker.encode_history({}, embedded, ranker.time_features(batch))
            tokens = jnp.where(ranges.covered(L)[..., None], tokens, 0)

            def read(targets: Array) -> Any:
                row = SequenceInput(tokens, targets, time, batch.request_time, ranges)
                return ranker.sequence(row)

            return self._score(ranker, read, requests, ranges.lengths)

    def _score(
        self, ranker: Ranker, read: HistoryReader, inputs: ScoreInputs, num_events: Array
    ) -> Array:
        target = self.target.unpack(inputs.target)
        numbers = {name: target[name][..., 0] for name in ranker.number_names}
        request = {
            name: jnp.broadcast_to(x[:, None], (*inputs.target.shape[:2], x.shape[-1]))
            for name, x in self.request.unpack(inputs.request).items()
        }
        statistics = []
        if ranker.match_channel is not None:
            matches, last_age, decayed = jnp.split(inputs.matches, (1, 2), -1)
            found = MatchStatistics(matches[..., 0], decayed, last_age[..., 0])
            statistics = ranker.match_channel.columns(found, num_events, inputs.soft)
        embedded = {"target": target, "request": request}
        return ranker.score(read, Candidates(numbers, {}, statistics, embedded))[0]

    def _ranker(self, weights: Weights) -> Ranker:
        flat = flatten(self._abstract_dense)
        tree = jax.tree.structure(self._abstract_dense)
        dense = jax.tree.unflatten(tree, [weights[name] for name in flat])
        return merge_ranker(
            self._graph, dense, {name: jnp.zeros((1, w)) for name, w in self._tables.items()}
        )

    def _caches(self, ranker: Ranker) -> Mapping[str, tuple[Cache, Cache]]:
        stca = ranker.sequence
        assert isinstance(stca, Stca)  # which can cache, as its config says
        return make_caches(stca, self._config.dtype)

    def _packed(self, ranker: Ranker, names: tuple[str, ...]) -> PackedFeatures:
        return PackedFeatures(names, tuple(ranker.embedding.widths_of(names).values()))


def abstract_ranker(config: RankerConfig, schema: Schema) -> Ranker:
    """The model without parameters, as it is served.

    Args:
      config: As it was trained. Nothing is computed again, and no kernel of one platform is used.
      schema: Of the dataset.
    """
    sequence = config.sequence
    if isinstance(sequence, StcaConfig):
        sequence = dataclasses.replace(sequence, attention_implementation="xla")
    config = dataclasses.replace(config, sequence=sequence, remat="none")
    return nnx.eval_shape(lambda: Ranker(config, schema, rngs=nnx.Rngs(0)))


def flatten(dense: Mapping[str, Any]) -> dict[str, Any]:
    """Nested parameters by path, as in "sequence/layers/0/w_key"."""

    def name(path: Any) -> str:
        return "/".join(str(key.key) for key in path)

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dense)}


def lower(function: Callable[..., Any], *arguments: Any) -> bytes:
    """The StableHLO of a function for all platforms, serialised.

    Products are float32 on every platform: a GPU's default would round to 10 bits.
    """
    with jax.default_matmul_precision("highest"):
        exported = jax_export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    return bytes(exported.serialize())


def lower_all(served: ServedRanker, *, max_history: int, uncached: bool) -> dict[str, bytes]:
    """All programs of a model, by path below `programs/`."""
    weights = served.abstract_weights

    def array(*shape: Any, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def inputs(users: Any, targets: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        stats = 2 + len(served.decay_seconds)
        soft = len(served.soft_fields)
        return (  # the fields of ScoreInputs
            array(users, dtype=np.int32),
            array(users, targets, sum(served.target.widths)),
            array(users, sum(served.request.widths)),
            array(users, targets, len(served.match_fields), stats),
            *([array(users, targets, soft)] if soft else []),
        )

    if uncached:
        return {
            f"rows/{length}x{num_targets}": lower(
                served.score_rows,
                weights,
                array(1, length, sum(served.history.widths)),
                array(1, length, dtype=np.int32),
                array(1, dtype=np.int32),
                inputs(1, num_targets),
            )
            for length in sorted({min(SHORT_ROW, max_history), max_history})
            for num_targets in ROW_TARGETS
        }
    lowered_by_path = {}
    U, M, a, P, T = jax_export.symbolic_shape("u, m, a, p, t")
    where = (array(U, -(-max_history // PAGE), dtype=np.int32), array(U, dtype=np.int32))
    width = sum(served.history.widths)
    for kind, (cache, _) in served.caches.items():
        pool = {
            name: array(x.layers, P, *x.shape, dtype=jnp.dtype(x.dtype))
            for name, x in cache.arrays.items()
        }
        integer = array(dtype=np.int32)
        arguments = {
            "write_page": (array(PAGE, width), array(PAGE, dtype=np.int32), integer),
            "append": (array(T, width), array(3, T, dtype=np.int32), integer),
            "score_few": (where, inputs(U, M)),
            "score": (where, inputs(U, M)),
            "score_tiles": (where, inputs(U, TARGET_TILE * a)),
        }
        for name, function in served.cache_programs(kind).items():
            lowered_by_path[f"{kind}/{name}"] = lower(function, weights, pool, *arguments[name])
    return lowered_by_path
