"""Sets of shingles of texts, which of them are likely to be alike (MinHash and LSH), and how alike two are.

Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", chapter 3. MinHash is rensa's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

PERMUTATIONS = 128
_SEED = 1
# A pair at the threshold is to be found with this probability.
_RECALL = 0.99
# Shingles kept of a text: all of a problem; of a long text the smallest hashes, which are a random sample (KMV sketch,
# Bar-Yossef et al. 2002): the similarity is then known to about 0.013.
KEPT_SHINGLES = 1024

Hashes = npt.NDArray[np.uint64]
_Number = TypeVar("_Number", np.uint64, np.uint32)


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: `count` bands of `width` values each; equal bands make two texts candidates."""

    count: int
    width: int

    def probability(self, similarity: float) -> float:
        """That two texts of this similarity become candidates."""
        return float(1 - (1 - similarity**self.width) ** self.count)


def bands_for(threshold: float) -> Bands:
    """The widest bands (fewest candidates) that find a pair at the threshold with probability 0.99."""
    shapes = [Bands(PERMUTATIONS // width, width) for width in range(1, 33)]
    return max((shape for shape in shapes if shape.probability(threshold) >= _RECALL), key=lambda shape: shape.width)


def _mixed(values: Hashes) -> Hashes:
    """The finalizer of splitmix64: every bit of the result depends on all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _combined(columns: Sequence[Hashes]) -> Hashes:
    """One hash of each row of equally long columns."""
    total = np.zeros_like(columns[0])
    for column in columns:
        total = _mixed(total * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1))
    return total


def shingles(units: Hashes, size: int) -> Hashes:
    """Distinct hashes, sorted, of all runs of `size` units (characters, hashed words); shorter texts are one run."""
    size = min(size, len(units))
    if size == 0:
        return np.zeros(0, np.uint64)
    end = len(units) - size + 1
    return _distinct(np.sort(_combined([units[start : start + end] for start in range(size)])))


def shingles_of(texts: Sequence[Hashes], size: int) -> list[Hashes]:
    """:func:`shingles` of many texts, whose runs are hashed at once."""
    ends = np.cumsum([len(units) for units in texts])
    flat = np.concatenate([np.zeros(0, np.uint64), *texts])
    windows = max(0, len(flat) - size + 1)
    runs = _combined([flat[start : start + windows] for start in range(size)])
    found = []
    for units, end in zip(texts, ends, strict=True):
        whole = len(units) >= size  # a run must not go on into the next text
        found.append(_distinct(np.sort(runs[end - len(units) : end - size + 1])) if whole else shingles(units, size))
    return found


def _distinct(ordered: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def characters(text: str) -> Hashes:
    """The characters of `text` as units."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


def word_hashes(words: Sequence[str]) -> Hashes:
    """Words as units."""
    known = {word: _word_hash(word) for word in set(words)}
    return np.fromiter((known[word] for word in words), np.uint64, len(words))


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def band_keys(sets: Sequence[Hashes], bands: Bands, salts: Sequence[int]) -> Hashes:
    """Keys (texts, bands.count) of which two texts share at least one if they are likely to be alike.

    Texts with different salts (64 bits) never share a key.
    """
    import rensa

    offsets = np.cumsum([0, *(len(item) for item in sets)]).tolist()
    flat = np.concatenate([np.zeros(0, np.uint64), *sets])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, _SEED)
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(sets), PERMUTATIONS)
    keys = np.empty((len(sets), bands.count), np.uint64)
    for band in range(bands.count):
        columns = [signatures[:, band * bands.width + place] for place in range(bands.width)]
        keys[:, band] = _combined([np.array(salts, np.uint64), np.full(len(sets), band, np.uint64), *columns])
    return keys


def kept_shingles(hashes: Hashes) -> npt.NDArray[np.uint32]:
    """What is stored of a set of shingles: its smallest hashes, sorted, of 32 bits each."""
    return _distinct((hashes >> np.uint64(32)).astype(np.uint32))[:KEPT_SHINGLES]


def jaccard(one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32]) -> float:
    """Jaccard similarity of two sets by what is stored of them: exact for up to 1024 shingles, else estimated."""
    both = np.intersect1d(one, other, assume_unique=True)
    if max(len(one), len(other)) < KEPT_SHINGLES:
        total = len(one) + len(other) - len(both)
        return len(both) / total if total else 1.0
    # Beyond the smallest of the union a set may have hashes that weren't kept.
    union = np.union1d(one, other)[:KEPT_SHINGLES]
    return float(np.searchsorted(both, union[-1], side="right") / len(union))
