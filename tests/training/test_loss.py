"""The loss of E10 against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from strategies import SCHEMA, RequestLayout, UserLayout, make_batch, spoil_padding

from stca_jax.batch import empty_batch
from stca_jax.training.loss import binary_cross_entropy, target_weights

# Request A has three targets, B has one; A fills three of four slots of the first row.
TWO_REQUESTS = [
    [UserLayout(0, 4, [RequestLayout(0, 4, 3)])],
    [UserLayout(0, 2, [RequestLayout(0, 2, 1)])],
]


def two_requests():
    """A batch and logits whose losses are log 4, log 2, log 2 and log 4 in both tasks."""
    batch = make_batch(TWO_REQUESTS, shared=False, targets_per_row=4)
    log3 = np.log(3, dtype=np.float32)
    logits = np.zeros((2, 4, 2), np.float32)
    logits[0, 0] = log3  # p = 3/4 for label 0
    logits[1, 0] = -log3  # p = 1/4 for label 1
    batch.label[0, 0], batch.label[1, 0] = 0, 1
    return batch, logits


def test_every_target_weighs_the_same_by_default():
    batch, logits = two_requests()
    expected = (np.log(4) + np.log(2) + np.log(2) + np.log(4)) / 4
    np.testing.assert_allclose(binary_cross_entropy(logits, batch), expected, rtol=1e-6)


def test_every_request_weighs_the_same_if_asked():
    batch, logits = two_requests()
    expected = ((np.log(4) + np.log(2) + np.log(2)) / 3 + np.log(4)) / 2
    loss = binary_cross_entropy(logits, batch, "request")
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_request_split_over_rows_weighs_as_one():
    """Each target's weight is one over the targets of its whole request, in any row."""
    batch, logits = two_requests()
    split = empty_batch(SCHEMA, 4, 1, 1, shared_history=False)
    for row, place in enumerate(np.argwhere(batch.target_mask)):
        for name in ("label", "target_mask", "num_request_targets"):
            getattr(split, name)[row, 0] = getattr(batch, name)[*place]
    split_logits = logits[batch.target_mask][:, None]
    for weighting in ("target", "request"):
        together = binary_cross_entropy(logits, batch, weighting)
        apart = binary_cross_entropy(split_logits, split, weighting)
        np.testing.assert_allclose(apart, together, rtol=1e-6)


def test_tasks_weigh_the_same():
    batch, logits = two_requests()
    logits[0, 0, 1] = -logits[0, 0, 1]  # p = 1/4 for label 0: log 4/3 instead of log 4
    expected = ((np.log(4) + np.log(4 / 3)) / 2 + np.log(2) + np.log(2) + np.log(4)) / 4
    np.testing.assert_allclose(binary_cross_entropy(logits, batch), expected, rtol=1e-6)


@pytest.mark.parametrize("weighting", ["target", "request"])
def test_padding_reaches_neither_loss_nor_gradient(weighting):
    """Labels, counts and logits there are NaN or huge; the gradient is the weighted residual."""
    batch, logits = two_requests()
    mask, label = batch.target_mask, batch.label
    weights = np.array([1, 1, 1, 1]) if weighting == "target" else np.array([1 / 3] * 3 + [1])
    expected = np.zeros_like(logits)
    residual = expit(logits[mask].astype(float)) - label[mask]
    expected[mask] = residual * (weights / weights.sum() / 2)[:, None]
    clean_loss = binary_cross_entropy(logits, batch, weighting)
    logits[~mask] = np.nan
    loss, grad = jax.value_and_grad(binary_cross_entropy)(logits, spoil_padding(batch), weighting)
    assert loss == clean_loss
    np.testing.assert_allclose(grad, expected, atol=1e-7)


def test_confident_logits_do_not_overflow():
    batch, logits = two_requests()
    batch.label[...] = 1
    for logit, expected in ((1e4, 0), (-1e4, 1e4)):
        logits[...] = logit
        loss, grad = jax.value_and_grad(binary_cross_entropy)(logits, batch)
        assert loss == expected
        assert np.isfinite(grad).all()


def test_loss_is_float32_whatever_the_logits():
    batch, logits = two_requests()
    rough = jnp.asarray(logits, jnp.bfloat16)
    low = binary_cross_entropy(rough, batch)
    assert low.dtype == np.float32
    rounded = np.asarray(rough, np.float32)
    np.testing.assert_allclose(low, binary_cross_entropy(rounded, batch), rtol=1e-6)


def test_batch_without_targets_has_loss_and_gradient_zero():
    batch = empty_batch(SCHEMA, 2, 3, 4, shared_history=True)
    logits = np.ones((2, 4, 2), np.float32)
    loss, grad = jax.value_and_grad(binary_cross_entropy)(logits, batch)
    assert loss == 0
    assert (grad == 0).all()


def test_weights_of_padding_are_zero():
    batch = spoil_padding(two_requests()[0])
    weights = target_weights(batch, "request")
    np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 1 / 3, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize("weighting", ["target", "request"])
def test_losses_of_micro_batches_add_up(weighting):
    batch, logits = two_requests()
    total = target_weights(batch, weighting).sum()
    parts = [
        binary_cross_entropy(
            logits[row], jax.tree.map(lambda x, row=row: x[row], batch), weighting, total
        )
        for row in (slice(0, 1), slice(1, 2))
    ]
    np.testing.assert_allclose(
        sum(parts), binary_cross_entropy(logits, batch, weighting), rtol=1e-6
    )


@pytest.mark.parametrize("weighting", ["target", "request"])
def test_a_missing_label_has_no_weight_and_no_gradient(weighting):
    batch, logits = two_requests()
    logits[...] = np.random.default_rng(0).normal(size=logits.shape)
    batch.label[0, 1, 0] = batch.label[1, 0, 1] = np.nan
    loss, gradient = jax.value_and_grad(lambda z: binary_cross_entropy(z, batch, weighting))(
        jnp.asarray(logits)
    )
    total = weight = 0.0
    for row, slot in np.argwhere(batch.target_mask):
        for task in range(2):
            label, z = batch.label[row, slot, task], float(logits[row, slot, task])
            if not np.isnan(label):
                share = 1 / batch.num_request_targets[row, slot] if weighting == "request" else 1.0
                total -= share * np.log(expit(z if label else -z))
                weight += share
    np.testing.assert_allclose(loss, total / weight, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert gradient[0, 1, 0] == gradient[1, 0, 1] == 0
