"""Clusters of problems by their words: whole numbers throughout, so that no order of adding changes anything."""

from __future__ import annotations

import numpy as np
import pytest

from sft.data.read.record import text_hash
from sft.data.steps.select.clusters import DIMENSIONS, SCALE, WordVectors, assign, centroids, word_slots


def _uniform(name: str) -> float:
    return text_hash(name) / (1 << 128)


def _vectors(problems: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    slots = [sorted(rng.choice(300, 20, replace=False).tolist()) for _ in range(problems)]
    return WordVectors([slots[:10], slots[10:]], seed)(slots)


def test_words_and_not_numbers_make_the_slots() -> None:
    assert word_slots("Find 12 primes, FIND \\frac{3}{4}!") == word_slots("primes find frac")
    assert len(word_slots("求三角形的面积")) == 7 and word_slots("12 + 3 = ?") == []


def test_products_are_exact_in_float32() -> None:
    vectors = _vectors(400)
    centers = centroids(vectors, 12, _uniform)
    for exact in (vectors.astype(np.int64), centers.astype(np.int64)):
        lengths = np.sqrt((exact**2).sum(axis=1))
        assert (np.abs(lengths - SCALE) < np.sqrt(DIMENSIONS) / 2 + 1e-6).all()
    products = vectors.astype(np.int64) @ centers.astype(np.int64).T
    assert np.abs(products).max() < 2**24 and np.array_equal(vectors @ centers.T, products.astype(np.float32))
    assert (assign(vectors, centers) == products.argmax(axis=1)).all()


@pytest.mark.parametrize("clusters", [2, 5])
def test_centroids_lie_in_the_middle_of_what_they_attract(clusters: int) -> None:
    """Separate topics are found, and a step of k-means in float64 doesn't move them further than rounding."""
    rng = np.random.default_rng(1)
    slots = [
        sorted((100 * topic + rng.choice(40, 20, replace=False)).tolist()) for topic in range(5) for _ in range(60)
    ]
    vectors = WordVectors([slots], 0)(slots)
    centers = centroids(vectors, clusters, _uniform)
    nearest = assign(vectors, centers)
    means = np.stack([vectors[nearest == number].mean(axis=0, dtype=np.float64) for number in range(clusters)])
    means *= SCALE / np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(means - centers).max() <= 0.5 + 1e-6
    topics = np.repeat(np.arange(5), 60)
    assert all(len(set(nearest[topics == topic])) == 1 for topic in range(5)) and len(set(nearest)) == clusters


def test_fewer_different_problems_than_clusters() -> None:
    vectors = np.repeat(_vectors(3), 5, axis=0)
    assert len(centroids(vectors, 10, _uniform)) == 3
