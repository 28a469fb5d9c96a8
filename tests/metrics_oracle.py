"""The metrics by scikit-learn, torchmetrics, numpy and the MIND news challenge: what those of the
product must equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error

from dti_dist.evaluation.metrics import CALIBRATION_BINS
from dti_dist.evaluation.request_metrics import CUTS, REQUEST_METRICS


def click_metrics(
    labels: npt.NDArray[np.integer],
    probabilities: npt.NDArray[np.floating],
    users: npt.NDArray[np.integer],
) -> dict[str, float | int | None]:
    """Metrics over targets; None where one is undefined because only one class occurs.

    auc, log_loss, f1 and accuracy (threshold 0.5) are scikit-learn's. gauc: mean AUC of users,
    weighted by their targets, users of one class left out. ne: log loss over the entropy of the
    label rate (He et al., 2014). ece: torchmetrics' expected calibration error
    over 15 equal bins.

    Args:
        labels: [targets] 0 or 1.
        probabilities: [targets] of label 1.
        users: [targets] any integer that names the user.
    """
    clicks = labels.astype(np.int64)
    predicted = probabilities.astype(np.float64)
    rate = float(clicks.mean())
    two_classes = 0.0 < rate < 1.0
    loss = float(log_loss(clicks, predicted, labels=[0, 1]))
    positive = predicted >= 0.5
    gauc, uauc, users_of_one_class = _within_users(clicks, predicted, users.astype(np.int64))
    return {
        "auc": float(roc_auc_score(clicks, predicted)) if two_classes else None,
        "log_loss": loss,
        "f1": float(f1_score(clicks, positive, zero_division=0.0)),
        "accuracy": float(accuracy_score(clicks, positive)),
        "gauc": gauc,
        "uauc": uauc,
        "ne": loss / _entropy(rate) if two_classes else None,
        "ece": float(
            binary_calibration_error(
                torch.from_numpy(predicted), torch.from_numpy(clicks), n_bins=CALIBRATION_BINS
            )
        ),
        "targets": len(clicks),
        "users": len(np.unique(users)),
        "users_of_one_class": users_of_one_class,
        "label_rate": rate,
        "mean_prediction": float(predicted.mean()),
    }


def _entropy(rate: float) -> float:
    return -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def _within_users(
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
    users: npt.NDArray[np.int64],
) -> tuple[float | None, float | None, int]:
    order = np.lexsort((probabilities, users))
    labels, probabilities, users = labels[order], probabilities[order], users[order]
    new_user = np.diff(users, prepend=users[0] - 1) != 0
    new_value = new_user | (np.diff(probabilities, prepend=-1.0) != 0)
    value = np.cumsum(new_value) - 1  # equal ones of one user are one
    clicks, others = (np.bincount(value, labels == label) for label in (1, 0))
    user = (np.cumsum(new_user) - 1)[new_value]
    below = np.cumsum(others) - others
    below -= below[np.flatnonzero(new_user[new_value])][user]
    won, of_1, of_0 = (
        np.bincount(user, c) for c in (clicks * (below + others / 2), clicks, others)
    )
    both = (of_1 > 0) & (of_0 > 0)
    if not both.any():
        return None, None, len(both)
    auc = won[both] / (of_1 * of_0)[both]
    gauc = float(np.average(auc, weights=(of_1 + of_0)[both]))
    return gauc, float(auc.mean()), int(np.sum(~both))


def request_metrics(request: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Of a request with both labels, as (label, probability): means over all orders in which the
    probabilities fall."""
    values = sorted({probability for _, probability in request}, reverse=True)
    tied = [set(permutations([y for y, p in request if p == value])) for value in values]
    orders = [_of_order([y for part in order for y in part]) for order in product(*tied)]
    return {name: float(np.mean([order[name] for order in orders])) for name in REQUEST_METRICS}


def _of_order(ordered: list[int]) -> dict[str, float]:
    """As the challenge's evaluate.py has them, of labels by falling scores."""
    clicks = [at for at, label in enumerate(ordered) if label]
    others = [at for at, label in enumerate(ordered) if not label]
    return {
        "request_auc": float(np.mean([click < other for click in clicks for other in others])),
        "mrr": sum(label / (at + 1) for at, label in enumerate(ordered)) / sum(ordered),
        **{f"ndcg@{k}": _dcg(ordered, k) / _dcg(sorted(ordered)[::-1], k) for k in CUTS},
        **{f"hit@{k}": float(any(ordered[:k])) for k in CUTS},
    }


def _dcg(ordered: list[int], cut: int) -> float:
    return sum((2**label - 1) / math.log2(at + 2) for at, label in enumerate(ordered[:cut]))
