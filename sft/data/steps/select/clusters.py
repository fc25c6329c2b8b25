"""Clusters of problems by their words, without a model: TF-IDF, random projection, spherical k-means.

Words are hashed to slots, weighted by inverse document frequency (a word counts once a problem), projected to a few
hundred dimensions by random signs (Achlioptas 2003, doi 10.1016/S0022-0000(03)00025-4), and clustered by k-means on the
sphere (Dhillon and Modha 2001, doi 10.1023/A:1007612920971) over a sample. Vectors and centroids are rounded to whole
numbers that float32 adds without rounding, so the clusters are the same with any number of threads, on any machine.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

SLOTS = 1 << 16
DIMENSIONS = 256
SAMPLE = 20_000
ROUNDS = 10
# Candidates for each next seed, of which the best is taken: k-means++ falls into worse local optima without.
TRIALS = 4
# Length of a vector. With 2048, products of two and all their partial sums stay below 2^24.
SCALE = 2048
# Chinese, Japanese and Korean write words without spaces: there each character stands for itself.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def word_slots(text: str) -> list[int]:
    """The slots, ascending, of the different words of a text; numbers and symbols don't count."""
    words = {zlib.crc32(word.encode("utf-8", "surrogatepass")) % SLOTS for word in _WORD.findall(text.lower())}
    return sorted(words)


class WordVectors:
    """Turns lists of slots into vectors of whole numbers, of length SCALE where a word says something."""

    def __init__(self, documents: Iterable[Sequence[Sequence[int]]], seed: int) -> None:
        """`documents`: batches of slot lists, from which the weights of words are learned."""
        counts, total = np.zeros(SLOTS, dtype=np.int64), 0
        for batch in documents:
            total += len(batch)
            for slots in batch:
                counts[slots] += 1
        weights = np.rint(64 * np.log((1 + total) / (1 + counts)))
        # A word of one problem alone makes it like no other.
        self._weights = np.where(counts < 2, 0, weights).astype(np.int32)
        bits = hashlib.shake_128(f"clusters {seed}".encode()).digest(SLOTS * DIMENSIONS // 8)
        signs = np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(SLOTS, DIMENSIONS)
        self._signs = (2 * signs.astype(np.int8) - 1).astype(np.int8)

    def __call__(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors (len(batch), DIMENSIONS) of whole numbers."""
        sums = np.zeros((len(batch), DIMENSIONS), dtype=np.int64)
        for row, slots in enumerate(batch):
            sums[row] = self._weights[slots] @ self._signs[slots]
        return _on_sphere(sums)


def _on_sphere(vectors: NDArray[np.int64]) -> NDArray[np.float32]:
    lengths = np.sqrt((vectors**2).sum(axis=1, keepdims=True, dtype=np.int64))
    return np.rint(vectors * (SCALE / np.maximum(lengths, 1))).astype(np.float32)


def centroids(sample: NDArray[np.float32], clusters: int, uniform: Callable[[str], float]) -> NDArray[np.float32]:
    """At most `clusters` centroids (k, DIMENSIONS) of a sample (n, DIMENSIONS) in a fixed order; fewer where it has
    fewer different points. `uniform` draws a number in [0, 1) by a name."""
    found = _seeds(sample, clusters, uniform)
    for _ in range(ROUNDS):
        nearest = assign(sample, found)
        order = np.argsort(nearest, kind="stable")
        filled, starts = np.unique(nearest[order], return_index=True)
        moved = found.copy()
        moved[filled] = _on_sphere(np.add.reduceat(sample[order], starts, axis=0, dtype=np.int64))
        if np.array_equal(moved, found):
            break
        found = moved
    return found


def _seeds(sample: NDArray[np.float32], clusters: int, uniform: Callable[[str], float]) -> NDArray[np.float32]:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): points drawn by their squared distance to those chosen."""
    norms = np.einsum("nd,nd->n", sample, sample).astype(np.int64)
    distance = np.full(len(sample), 4 * SCALE**2, dtype=np.int64)
    chosen: list[int] = []
    while len(chosen) < clusters and distance.any():
        total = np.cumsum(distance)
        draws = [int(uniform(f"{len(chosen)} {trial}") * int(total[-1])) for trial in range(TRIALS)]
        candidates = np.searchsorted(total, draws, side="right")
        products = (sample @ sample[candidates].T).astype(np.int64)
        distances = np.minimum(distance[:, None], norms[:, None] + norms[candidates] - 2 * products)
        best = int(distances.sum(axis=0).argmin())
        chosen.append(int(candidates[best]))
        distance = distances[:, best]
    return sample[chosen]


def assign(vectors: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number of the nearest centroid of each vector (n,); the first of equals."""
    return (vectors @ centers.T).argmax(axis=1)
