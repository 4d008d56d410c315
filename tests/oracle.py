"""An independent implementation of the model's equations: NumPy, float64, one target at a time.

It knows no rows, slots, ranges or masks: a target comes with its own history and nothing else.
Parameters are nested dicts of arrays, named like the attributes of the package's modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from stca_jax.batch import RequestBatch
from stca_jax.models.ranker import RankerConfig
from stca_jax.schema import Schema

Params = Mapping[Any, Any]

# What public re-implementations do instead of the equations.
Mistake = Literal[
    "heads averaged before W_V",
    "same query in every layer",
    "no query fusion",
    "no history FFN",
    "one history FFN for all layers",
    "history encoded from the layer below",
    "residual around the attention",
    "residual around the query encoder",
    "residual around the history encoder",
    "query encoded twice",
]


def swiglu(p: Params, x: np.ndarray) -> np.ndarray:
    gate = x @ p["gate"]
    return ((x @ p["up"]) * (gate / (1 + np.exp(-gate)))) @ p["out"]


def layer_norm(p: Params, x: np.ndarray) -> np.ndarray:
    deviation = x - x.mean(-1, keepdims=True)
    return (
        deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
    )


def linear(p: Params, x: np.ndarray) -> np.ndarray:
    return x @ p["weight"] + p.get("bias", 0)


def log_count(count: float) -> float:
    return 0.25 * np.log(1 + count)


def log_bucket(value: int) -> int:
    """1 + floor(2 log2 value) in exact integers; 0 for 0."""
    return (int(value) ** 2).bit_length()


class Gathered(NamedTuple):
    """What a target gathered: z [d], the count channel, and each layer's attention [h, n]."""

    summary: np.ndarray
    counts: np.ndarray
    attention: list[np.ndarray]


def stca(
    p: Params,
    x: np.ndarray,
    target: np.ndarray,
    age_days: np.ndarray,
    mistake: Mistake | None = None,
    temperature_length: int | None = None,
    skip_paths: bool = False,
) -> Gathered:
    """E1-E7 with the count channel, the recency score and the sink, if the parameters have them.

    Args:
      p: Parameters of the sequence module.
      x: [n, d] history tokens.
      target: [d] target token x_t.
      age_days: [n] request time - event time.
      mistake: What to get wrong.
      temperature_length: As in `StcaConfig`.
      skip_paths: As in `StcaConfig`.
    """
    n = len(x)
    sharpness = np.log(1 + n) / np.log(1 + temperature_length) if temperature_length else 1.0
    outputs: list[np.ndarray] = []
    attentions: list[np.ndarray] = []
    counts = [log_count(n)]
    query, below = target, x
    for i, layer in sorted(p["layers"].items()):
        # E1
        encoder = p["layers"][0] if mistake == "one history FFN for all layers" else layer
        source = below if mistake == "history encoded from the layer below" else x
        encoded = source if mistake == "no history FFN" else swiglu(encoder["history_ffn"], source)
        if skip_paths or mistake == "residual around the history encoder":
            encoded = encoded + source
        below = encoded = layer_norm(encoder["history_norm"], encoded)
        # E2, E6
        if i == 0 or mistake == "no query fusion":
            fused = target
        else:
            fused = np.concatenate([*outputs, target]) @ layer["fusion"]["weight"]
            if "count_weight" in layer["fusion"]:
                fused = fused + np.array(counts) @ layer["fusion"]["count_weight"]
        if i == 0 or mistake != "same query in every layer":
            previous = query
            skipped = fused if skip_paths else 0
            query = layer_norm(layer["query_norm"], skipped + swiglu(layer["query_ffn"], fused))
            if mistake == "query encoded twice":
                query = layer_norm(layer["query_norm"], swiglu(layer["query_ffn"], query))
            if mistake == "residual around the query encoder":
                query = query + previous
        # E3-E5
        num_heads, head_width = layer["w_query"].shape[1:]
        attention = np.zeros((num_heads, n))
        for j in range(num_heads):
            scores = np.zeros(n)
            for t in range(n):
                key = encoded[t] @ layer["w_key"][:, j]
                scores[t] = (query @ layer["w_query"][:, j]) @ key / np.sqrt(head_width)
                scores[t] *= sharpness
                if "recency_rate" in layer:
                    scores[t] -= layer["recency_rate"][j] * age_days[t]
            total = np.exp(scores).sum()
            sink = np.exp(layer["sink"][j]) if "sink" in layer else 0.0
            attention[j] = np.exp(scores) / (total + sink)
            counts.append(0.25 * np.log(total) if n else 0.0)
        attentions.append(attention)
        if mistake == "heads averaged before W_V":
            attention = np.repeat(attention.mean(0, keepdims=True), num_heads, 0)
        heads = [attention[j] @ encoded @ layer["w_value"][:, j] for j in range(num_heads)]
        output = np.concatenate(heads) @ layer["w_output"]["weight"]
        if mistake == "residual around the attention":
            output = output + query
        outputs.append(output)
    # E7
    fused = np.concatenate([*outputs, target]) @ p["output_fusion"]["weight"]
    if "count_weight" in p["output_fusion"]:
        fused = fused + np.array(counts) @ p["output_fusion"]["count_weight"]
    else:
        counts = []
    return Gathered(swiglu(p["output_ffn"], fused), np.array(counts), attentions)


def rank_mixer(p: Params, tokens: list[np.ndarray]) -> np.ndarray:
    """E9: tokens exchange slices, then each has an FFN of its own; the mean of the tokens."""
    num_tokens = len(tokens)
    part = len(tokens[0]) // num_tokens
    for _, block in sorted(p.get("blocks", {}).items()):
        mixed = [
            np.concatenate([token[s * part : (s + 1) * part] for token in tokens])
            for s in range(num_tokens)
        ]
        tokens = [layer_norm(block["mix_norm"], m + t) for m, t in zip(mixed, tokens, strict=True)]
        for s, token in enumerate(tokens):
            ffn = {name: weight[s] for name, weight in block["ffn"].items()}
            hidden = token @ ffn["up"] + ffn["up_bias"]
            cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
            hidden = 0.5 * hidden * (1 + np.tanh(cubic))  # GELU
            token = token + hidden @ ffn["down"] + ffn["down_bias"]
            tokens[s] = layer_norm(block["ffn_norm"], token)
    return np.mean(tokens, axis=0)


@dataclasses.dataclass(frozen=True)
class Example:
    """One target with its own history: what the model may look at."""

    history: dict[str, np.ndarray]
    history_time: np.ndarray
    target: dict[str, Any]
    request: dict[str, Any]
    request_time: int
    label: np.ndarray
    num_request_targets: int


def examples(batch: RequestBatch) -> Iterator[tuple[int, int, Example]]:
    """Row, slot and contents of every valid target."""
    for r, m in np.argwhere(batch.target_mask):
        window = slice(batch.history_start[r, m], batch.history_end[r, m])
        yield (
            int(r),
            int(m),
            Example(
                history={name: column[r, window] for name, column in batch.history.items()},
                history_time=batch.history_time[r, window].astype(np.int64),
                target={name: column[r, m] for name, column in batch.target.items()},
                request={name: column[r, m] for name, column in batch.request.items()},
                request_time=int(batch.request_time[r, m]),
                label=batch.label[r, m].astype(np.float64),
                num_request_targets=int(batch.num_request_targets[r, m]),
            ),
        )


def score(p: Params, config: RankerConfig, schema: Schema, example: Example) -> np.ndarray:
    """E1-E10: one logit per task."""

    def embed(name: str, value: Any) -> np.ndarray:
        if name in schema.vocabularies:
            return p["embedding"]["tables"][name]["rows"][value]
        return np.array([value], np.float64)

    def fuse(fusion: Params, item: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
        base = linear(fusion["project"], item) if "project" in fusion else item
        for name, weight in fusion.get("side", {}).items():
            base = base + parts[name] @ weight
        return base + swiglu(fusion["ffn"], np.concatenate([item, *parts.values()]))

    n = len(example.history_time)
    age = example.request_time - example.history_time
    x = np.zeros((n, config.sequence.width))
    for t in range(n):
        parts = {f: embed(f, example.history[f][t]) for f in schema.history if f != schema.item}
        of_time = p.get("time_features", {})
        if config.embedding.time_delta:
            parts["token time_delta"] = of_time["time_delta"]["rows"][log_bucket(age[t])]
        if config.embedding.recency_index:
            parts["token recency_index"] = of_time["recency_index"]["rows"][log_bucket(n - 1 - t)]
        item = embed(schema.item, example.history[schema.item][t])
        x[t] = fuse(p["history_fusion"], item, parts)

    statistics = match_channel(p, config, schema, example) if config.match_channel else []
    parts = {f: embed(f, example.target[f]) for f in schema.target if f != schema.item}
    if config.match_channel and not config.match_time_scales_days:
        num_soft = len(schema.match_fields) - 1 if config.match_soft_counts else 0
        parts["match statistics"] = np.array(statistics[: len(statistics) - num_soft])
    target = fuse(p["target_fusion"], embed(schema.item, example.target[schema.item]), parts)
    temperature_length = config.sequence.temperature_length
    z, counts, _ = stca(
        p["sequence"], x, target, age / 86_400, temperature_length=temperature_length,
        skip_paths=config.sequence.skip_paths,
    )  # fmt: skip

    numbers = [example.target[f] for f in schema.target if f not in schema.vocabularies]
    inputs = {"summary": z, "target": target}
    if schema.request:
        inputs["request"] = np.concatenate([embed(f, example.request[f]) for f in schema.request])
    if len(numbers) + len(statistics) + len(counts):
        inputs["numbers"] = np.concatenate([numbers, statistics, counts])
    tokens = [linear(p["token_maps"][name], value) for name, value in inputs.items()]
    return linear(p["head"], rank_mixer(p.get("backbone", {}), tokens))


def match_channel(p: Params, config: RankerConfig, schema: Schema, example: Example) -> list[float]:
    """Counts of exact matches, decayed counts, ages of the last match, soft counts; item first."""
    age = example.request_time - example.history_time
    others = [f for f in schema.target if f in schema.history and f in schema.vocabularies]
    fields = [schema.item, *(f for f in others if f != schema.item)]
    counts, decayed, last, share = [], [], [], []
    for field in fields:
        days = [
            a / 86_400
            for a, v in zip(age, example.history[field], strict=True)
            if v == example.target[field]
        ]
        counts.append(log_count(len(days)))
        for scale in config.match_time_scales_days or (config.match_decay_days,):
            decayed.append(log_count(sum(np.exp(-a / scale) for a in days)))
        last.append(log_count(min([*days, 3650.0])))
        share.append(len(days) / max(len(age), 1))
    soft = []
    for k, field in enumerate(fields[1:] if config.match_soft_counts else []):
        rows = p["embedding"]["tables"][field]["rows"]
        target = rows[example.target[field]]
        likeness = [
            rows[v] @ target / (np.linalg.norm(rows[v]) * np.linalg.norm(target))
            for v in example.history[field]
        ]
        sharpness = p["match_channel"]["sharpness"][k]
        soft.append(log_count(sum(np.exp(sharpness * (c - 1)) for c in likeness)))
    if config.match_time_scales_days:
        return [*counts, *decayed, *last, *share, *soft]
    return [*counts, decayed[0], last[0], *soft]


def logits(p: Params, config: RankerConfig, schema: Schema, batch: RequestBatch) -> np.ndarray:
    """[R, M, tasks]; NaN in padding."""
    out = np.full(batch.label.shape, np.nan)
    for r, m, example in examples(batch):
        out[r, m] = score(p, config, schema, example)
    return out


def loss(
    p: Params,
    config: RankerConfig,
    schema: Schema,
    batch: RequestBatch,
    weighting: Literal["target", "request"] = "target",
) -> float:
    """E10: the weighted mean over targets of the mean over tasks."""
    total = weights = 0.0
    for _, _, example in examples(batch):
        logit = score(p, config, schema, example)
        # -log sigmoid of the logit's sign that the label asks for
        each = np.log1p(np.exp(-np.where(example.label == 1, logit, -logit)))
        weight = 1.0 if weighting == "target" else 1.0 / example.num_request_targets
        total += weight * each.mean()
        weights += weight
    return total / max(weights, 1e-30)
