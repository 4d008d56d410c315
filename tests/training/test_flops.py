"""Analytic FLOPs against the matrix products that JAX traces, and against the paper's formula."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from strategies import SCHEMA
from tiny_ranker import CONFIGS

from stca_jax.batch import empty_batch
from stca_jax.models import din, hstu, sequence_o1
from stca_jax.models.din import DinConfig
from stca_jax.models.hstu import HstuConfig
from stca_jax.models.longer import LongerConfig
from stca_jax.models.mixformer import MixFormerConfig
from stca_jax.models.ranker import Ranker, RankerConfig, paper_config
from stca_jax.models.sasrec import SasRecConfig
from stca_jax.models.sdim import SdimConfig
from stca_jax.models.sequence import SequenceInput
from stca_jax.models.sequence_o1 import SequenceO1Config
from stca_jax.models.stca import StcaConfig
from stca_jax.models.target_attention import TargetAttentionConfig
from stca_jax.models.top_k import TopKConfig
from stca_jax.models.transact import TransActConfig
from stca_jax.models.transformer import TransformerConfig
from stca_jax.models.ultra_hstu import UltraHstuConfig
from stca_jax.ops import attention
from stca_jax.ranges import Ranges
from stca_jax.schema import Schema
from stca_jax.training.flops import CHIPS, chip_of, model_flops, step_traffic

R, L, M = 2, 24, 3


def count_dots(jaxpr) -> int:
    """FLOPs of all matrix products of a jaxpr and of those it calls."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count_dots(inner)
    return total


@pytest.mark.parametrize("order", ["absorbed", "projected"])
@pytest.mark.parametrize("name", ["paper", "shared", "exclusive"])
def test_counts_every_matrix_product(name, order):
    """The reference attention multiplies every target with every token of its row."""
    config = CONFIGS[name]
    sequence = dataclasses.replace(
        config.sequence, attention_order=order, attention_implementation="reference"
    )
    # Soft counts have no reference that compares every pair; see below.
    config = dataclasses.replace(config, sequence=sequence, match_soft_counts=False)
    batch = empty_batch(SCHEMA, R, L, M, shared_history=name == "shared")
    ranker = nnx.eval_shape(lambda: Ranker(config, SCHEMA, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(ranker)

    def loss(params):
        return nnx.merge(graph, params)(batch).sum()

    flops = model_flops(config, SCHEMA, L, M)
    amounts = (R * L, R * M, R * M * L)
    expected = flops.train_step(*amounts)
    forward = count_dots(jax.make_jaxpr(loss)(params).jaxpr)
    assert forward == expected / 3
    # A linear path multiplies numbers alone; nothing needs the gradient of those.
    numbers = {"history": 1, "target": 1}  # price, position
    if not config.match_time_scales_days:
        numbers["target"] += ranker.num_statistics
    needless = 2 * config.sequence.width * (R * L * numbers["history"] + R * M * numbers["target"])
    expected -= needless * config.embedding.linear_path
    assert count_dots(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr) == expected


def test_counts_the_cosines_of_soft_counts():
    """One of each side field for each target and token of its range, and a column that is read."""
    soft = CONFIGS["shared"]
    without = dataclasses.replace(soft, match_soft_counts=False)
    soft, without = (model_flops(config, SCHEMA, L, M) for config in (soft, without))
    num_fields = len(SCHEMA.match_fields) - 1
    assert num_fields > 0
    assert soft.per_pair - without.per_pair == num_fields * 2 * 3  # rows of three columns
    mixer_width = 8  # four tokens of two columns
    assert soft.per_target - without.per_target == num_fields * 2 * mixer_width
    assert soft.per_token == without.per_token


# Of modules that read but a part of the history, that part is the row here.
ROW = 64
RIVALS = {
    "din": DinConfig(width=8),
    "hstu": HstuConfig(width=8, num_layers=3, num_heads=2),
    "longer": LongerConfig(width=8, num_heads=2, merged_events=1, num_recent=ROW),
    "mixformer": MixFormerConfig(width=8, num_heads=2),
    "sasrec": SasRecConfig(width=8, num_layers=3, num_heads=2),
    "sdim": SdimConfig(width=8, num_heads=2, num_groups=3, recent_length=ROW),
    "sim": TopKConfig(width=8, num_heads=2, search="sim", num_selected=ROW, recent_length=ROW),
    "target attention": TargetAttentionConfig(width=8, num_heads=2),
    "transact": TransActConfig(width=8, num_heads=2, recent_length=ROW),
    "transformer": TransformerConfig(width=8, num_layers=3),
    "twin": TopKConfig(width=8, num_heads=2, num_selected=ROW, recent_length=ROW),
    "ultra_hstu": UltraHstuConfig(
        width=8, num_heads=2, local_length=ROW, global_length=ROW, num_tail_layers=1,
        num_layers=2, tail_length=ROW,
    ),
}  # fmt: skip


@pytest.fixture
def dense(monkeypatch):
    """Every reader multiplies every token of its row: no range, and no order of events."""

    def dense_sum(contribution, weights, per_target, per_token, ranges, block_sizes=None):
        of_row = functools.partial(contribution, weights)
        return jax.vmap(of_row)(per_target, per_token, ranges.contain(np.arange(ROW)))

    monkeypatch.setattr(attention, "best_implementation", lambda: "reference")
    for module in (hstu, sequence_o1):
        monkeypatch.setattr(module, "range_sum", dense_sum)
    monkeypatch.setattr(din, "_BLOCK", ROW)


def count_forward(config, num_targets):
    """FLOPs of a module's forward pass over R rows of ROW tokens, as JAX traces it."""
    inputs = SequenceInput(
        np.zeros((R, ROW, 8), np.float32),
        np.zeros((R, num_targets, 8), np.float32),
        *(np.zeros(shape, np.int32) for shape in ((R, ROW), (R, num_targets))),
        Ranges(*(np.zeros((R, num_targets), np.int32) for _ in range(2))),
    )
    module = config.make(remat=False, rngs=nnx.Rngs(0))
    return count_dots(jax.make_jaxpr(module)(inputs).jaxpr)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.usefixtures("dense")
def test_counts_every_matrix_product_of_rivals(name):
    config = RIVALS[name]
    cost = config.cost(M)
    expected = cost.per_token * R * ROW + cost.per_target * R * M
    expected += cost.per_pair * R * M * ROW + cost.per_token_pair * R * ROW**2
    # Rows of many requests have no shorter shape for what only targets need of the last layer.
    d = config.width
    if isinstance(config, HstuConfig):
        expected += (2 * d * d + 4 * d * ROW) * R * ROW
    if isinstance(config, UltraHstuConfig):  # of events alone: the second part of a semi-local mask
        expected += 4 * d * R * M * ROW
    assert count_forward(config, M) == expected


@pytest.mark.usefixtures("dense")
def test_counts_every_matrix_product_of_prototypes():
    """With one target a row: a loop over windows is traced once."""
    config = SequenceO1Config(
        width=8, num_heads=2, num_prototypes=5, num_sketch_layers=3, recent_length=ROW
    )
    cost = config.cost(1)
    expected = R * (cost.per_target + ROW * (cost.per_token + cost.per_pair))
    assert count_forward(config, 1) == expected


def test_history_costs_what_the_paper_says():
    """12 L d^2 for the history FFN of r = 2; 4 L d h absorbed, 4 L d^2 + 4 L d projected."""
    d, h, N = 32, 4, 3
    schema = Schema(("item",), ("item",), (), {"item": 9}, ("click",))
    for targets, order in ((10, "absorbed"), (11, "projected")):  # m > d / (h - 1)
        config = paper_config(StcaConfig(width=d, num_layers=N, num_heads=h))
        flops = model_flops(config, schema, 100, targets)
        fusion = 2 * ((d + 32) * 2 * d * 2 + 2 * d * d)  # item and two features of width 16
        projected = order == "projected"
        assert flops.per_token == fusion + N * (12 * d * d + 4 * d * d * projected)
        assert flops.per_pair == N * 4 * d * (1 if projected else h)


def test_vocabulary_costs_nothing():
    def of(rows: int):
        schema = Schema(("item",), ("item",), (), {"item": rows}, ("click",))
        return model_flops(RankerConfig(), schema, 100, 8)

    assert of(10) == of(10**8)


def test_chips_are_found_by_the_name_that_jax_gives_them():
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("cpu") is None


def test_traffic_grows_with_what_moves():
    schema = Schema(("item", "kind"), ("item",), (), {"item": 90, "kind": 5}, ("click",))
    config = RankerConfig(sequence=StcaConfig(width=8, num_layers=2), dtype="bfloat16")
    traffic = functools.partial(step_traffic, config, schema)
    amounts = {"tokens": 0, "targets": 0, "dense_bytes": 0, "optimizer_bytes": 0}
    expected = {
        "tokens": 5 * 4 * (8 + 16) + 9 * 8 * 2,
        "targets": 5 * 4 * 8,
        "dense_bytes": 6,
        "optimizer_bytes": 2,
    }
    for name, bytes_each in expected.items():
        np.testing.assert_equal(traffic(**(amounts | {name: 1})), bytes_each)
