"""Rival sequence modules as float64 functions of one target and its own window, in plain NumPy.

Each takes the parameters, the config, the window's tokens [n, d], the target [d], and a `Moment`.
None knows rows, ranges, tiles or other targets.
"""

from typing import NamedTuple

import numpy as np
import oracle


class Moment(NamedTuple):
    """When things happened: times of the events [n], and of the request."""

    events: np.ndarray
    request: int


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(scores):
    weights = np.exp(np.array(scores) - max(scores, default=0))
    return weights / weights.sum() if len(weights) else weights


def din(p, config, x, target, moment):
    """With weights of q - k, as the paper has them; the module folds them into those of q and k."""
    difference = np.random.default_rng(7).normal(size=p["key"]["weight"].shape)
    weight = [
        p["query"]["weight"] - difference,
        p["key"]["weight"] + difference,
        difference,
        p["product"]["weight"],
    ]
    pooled = np.zeros(len(target))
    for event in x:
        features = np.concatenate([target, event, target - event, target * event])
        hidden = features @ np.concatenate(weight) + p["query"]["bias"]
        swish = hidden / (1 + np.exp(-hidden))
        pooled += (swish @ p["score"]["weight"][:, 0]) * event
    pooled /= np.sqrt(max(len(x), 1))
    return np.concatenate([pooled, target]) @ p["output"]["weight"]


def transformer(p, config, x, target, moment):
    """All states of a sequence that ends with the target, which does not attend to itself."""
    states = [*x, target]
    for _, block in sorted(p["blocks"].items()):
        normed = [oracle.layer_norm(block["attention_norm"], s) for s in states]
        states = [
            transformer_block(block, state, normed[i], normed[: min(i + 1, len(x))])
            for i, state in enumerate(states)
        ]
    return oracle.layer_norm(p["output_norm"], states[-1])


def transformer_block(p, state, query, past):
    heads = []
    for h in range(p["w_query"].shape[1]):
        q = query @ p["w_query"][:, h]
        weights = [np.exp(q @ (y @ p["w_key"][:, h]) / np.sqrt(len(q))) for y in past]
        summed = sum((w * (y @ p["w_value"][:, h]) for w, y in zip(weights, past, strict=True)), 0)
        heads.append(summed / max(sum(weights), 1e-30) + np.zeros(len(q)))
    state = state + oracle.linear(p["w_output"], np.concatenate(heads))
    return state + oracle.swiglu(p["ffn"], oracle.layer_norm(p["ffn_norm"], state))


def attended(p, query, tokens, places=None):
    """Multi-head attention of a vector to tokens, or to each head's own choice of them."""
    heads = []
    for h in range(p["w_query"].shape[1]):
        chosen = tokens if places is None else tokens[places[h]]
        q = query @ p["w_query"][:, h]
        weight = softmax([q @ (y @ p["w_key"][:, h]) / np.sqrt(len(q)) for y in chosen])
        values = np.array([y @ p["w_value"][:, h] for y in chosen]).reshape(-1, len(q))
        heads.append(weight @ values)
    return np.concatenate(heads)


def target_attention(p, config, x, target, moment):
    gathered = attended(p["reader"], target, x)
    return oracle.linear(p["output"], np.concatenate([gathered, target]))


def best(scores, k):
    """Places of the k largest; of equals, the older."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def top_k(p, config, x, target, moment):
    reader, k = p["selected"], config.num_selected
    num_heads, found = config.num_heads, []
    if config.search == "sim":
        asked = oracle.linear(p["search_target"], target)
        scores = [asked @ oracle.linear(p["search_token"], y) / np.sqrt(len(y)) for y in x]
        places = [best(scores, k)] * num_heads
        weighted = sum((s * y for s, y in zip(scores, x, strict=True)), np.zeros(len(target)))
        found = [weighted / np.sqrt(max(len(x), 1))]
    else:
        places = []
        for h in range(num_heads):
            q = target @ reader["w_query"][:, h]
            places.append(best([q @ (y @ reader["w_key"][:, h]) for y in x], k))
    selected = attended(reader, target, x, places)
    recent = attended(p["recent"], target, x[max(len(x) - config.recent_length, 0) :])
    return oracle.linear(p["output"], np.concatenate([selected, *found, recent, target]))


def sdim(p, config, x, target, moment):
    shape = (config.width, config.num_groups, config.bits)
    planes = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def bucket(y, g):
        return tuple(y @ planes[:, g] > 0)

    pooled = np.zeros(len(target))
    for g in range(config.num_groups):
        total = sum((y for y in x if bucket(y, g) == bucket(target, g)), np.zeros(len(target)))
        pooled += total / max(np.linalg.norm(total), 1e-6) / config.num_groups
    recent = attended(p["recent"], target, x[max(len(x) - config.recent_length, 0) :])
    return oracle.linear(p["output"], np.concatenate([pooled, recent, target]))


def rms_norm(p, x):
    return x / np.sqrt((x**2).mean(-1) + 1e-6) * p["scale"]


def head_ffn(p, i, x):
    normed = rms_norm(p["norm"], x)
    return x + (normed @ p["up"][i] * silu(normed @ p["gate"][i])) @ p["out"][i]


def mixformer(p, config, x, target, moment):
    N, K = config.num_heads, config.width // config.num_heads
    heads = oracle.linear(p["input"], target).reshape(N, K)
    for _, block in sorted(p["blocks"].items()):
        normed = [rms_norm(block["mix_norm"], head) for head in heads]
        slices = [[head[j * K // N : (j + 1) * K // N] for head in normed] for j in range(N)]
        mixed = [np.concatenate(parts) + head for parts, head in zip(slices, heads, strict=True)]
        history = [s + oracle.swiglu(block["history_ffn"], rms_norm(block["history_norm"], s))
                   for s in x]  # fmt: skip
        heads = []
        for i in range(N):
            query = head_ffn(block["query_ffn"], i, mixed[i])
            own = [h[i * K : (i + 1) * K] for h in history]
            weight = softmax([query @ (y @ block["key"][i]) / np.sqrt(K) for y in own])
            values = (w * (y @ block["value"][i]) for w, y in zip(weight, own, strict=True))
            heads.append(head_ffn(block["output_ffn"], i, sum(values, query)))
    return np.concatenate(heads)


def sasrec(p, config, x, target, moment):
    if not len(x):
        return np.zeros(len(target))
    states = list(x)
    for _, block in sorted(p["blocks"].items()):
        normed = [oracle.layer_norm(block["attention_norm"], s) for s in states]
        states = [
            transformer_block(block, s, normed[i], normed[: i + 1]) for i, s in enumerate(states)
        ]
    return oracle.layer_norm(p["output_norm"], states[-1]) * target


def transact(p, config, x, target, moment):
    newest = x[::-1][: config.recent_length]
    states = [oracle.linear(p["input"], np.concatenate([y, target])) for y in newest]
    for _, block in sorted(p["blocks"].items()):
        normed = [oracle.layer_norm(block["attention_norm"], s) for s in states]
        states = [
            transformer_block(block, s, y, normed) for s, y in zip(states, normed, strict=True)
        ]
    empty = np.zeros(len(target))
    largest = np.max(states, axis=0) if states else empty
    outputs = [*states, *[empty] * config.num_outputs][: config.num_outputs]
    return oracle.linear(p["output"], np.concatenate([largest, *outputs, target]))


def longer(p, config, x, target, moment):
    K, k = config.merged_events, config.num_recent
    empty = np.zeros(len(target))
    merged = []
    for end in range(len(x), 0, -K):
        group = [*[empty] * K, *x[max(end - K, 0) : end]][-K:]
        merged.insert(0, oracle.linear(p["merge"], np.concatenate(group)))
    above = [target, p["global_token"][0]]
    for i, block in sorted(p["blocks"].items()):

        def norm(states, block=block):
            return [oracle.layer_norm(block["attention_norm"], s) for s in states]

        seen = merged if i == 0 else merged[-k:]
        top, below = norm(above), norm(seen)
        above = [transformer_block(block, s, y, [*below, *top])
                 for s, y in zip(above, top, strict=True)]  # fmt: skip
        merged = [transformer_block(block, s, y, below[: j + 1])
                  for j, (s, y) in enumerate(zip(seen, below, strict=True))]  # fmt: skip
    return oracle.layer_norm(p["output_norm"], above[0])


def log_bucket(value):
    return 0 if value < 1 else 1 + int(np.floor(2 * np.log2(value) + 1e-9))


def hstu(p, config, x, target, moment):
    """The target is the last of a sequence; `seen` are the places that each reads."""
    return hstu_stack(p, config, x, target, moment, lambda layer, i: range(i + 1), lambda layer: 0)


def ultra_hstu(p, config, x, target, moment):
    n = len(x)

    def first(layer):
        in_tail = layer >= config.num_layers - config.num_tail_layers
        return max(n - config.tail_length, 0) if in_tail else 0

    def seen(layer, i):
        begin = first(layer)
        near = range(max(begin, i + 1 - config.local_length), i + 1)
        return sorted({*range(begin, min(begin + config.global_length, i + 1)), *near})

    return hstu_stack(p, config, x, target, moment, seen, first)


def hstu_stack(p, config, x, target, moment, seen, first):
    n, H = len(x), config.num_heads
    times = [*moment.events, moment.request]
    states = [*x, target]
    for layer, weights in sorted(p["layers"].items()):
        normed = [oracle.layer_norm(weights["norm"], s) for s in states]
        parts = [np.split(silu(oracle.linear(weights["projection"], y)), 4) for y in normed]
        states = list(states)
        for i in range(first(layer), n + 1):
            places = [*range(first(layer), n), n] if i == n else seen(layer, i)
            total = []
            for h in range(H):
                _, value, query, key = ([part.reshape(H, -1)[h] for part in column]
                                        for column in zip(*parts, strict=True))  # fmt: skip
                summed = np.zeros(len(query[i]))
                for j in places:
                    score = query[i] @ key[j] / np.sqrt(len(query[i]))
                    if config.relative_bias:
                        score += weights["time_bias"][log_bucket(times[i] - times[j]), h]
                        score += weights["position_bias"][log_bucket(i - j), h]
                    summed += silu(score) * value[j] / config.max_length
                total.append(summed)
            gated = oracle.layer_norm(weights["attended_norm"], np.concatenate(total)) * parts[i][0]
            states[i] = states[i] + oracle.linear(weights["output"], gated)
    return oracle.layer_norm(p["output_norm"], states[-1])


def sequence_o1(p, config, x, target, moment):
    states = p["prototypes"]
    for _, layer in sorted(p["sketch_layers"].items()):
        query, key = oracle.linear(layer["query"], states), oracle.linear(layer["key"], x)
        scores = query @ key.T / np.sqrt(len(target))
        share = np.exp(scores) / np.exp(scores).sum(0)
        summed = oracle.layer_norm(layer["sum_norm"], states + share @ x)
        states = oracle.layer_norm(layer["ffn_norm"], summed + oracle.swiglu(layer["ffn"], summed))
    sketch = states if len(x) else states[:0]
    newest = x[max(len(x) - config.recent_length, 0) :]
    read = [
        oracle.stca(p[name], tokens, target, np.zeros(len(tokens))).summary
        for name, tokens in (("sketch_reader", sketch), ("recent_reader", newest))
    ]
    return oracle.linear(p["output"], np.concatenate(read))
