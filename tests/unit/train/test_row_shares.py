"""Rows in shares: where they are cut, what a share lacks, whose row a rank gets, and what is refused."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_sambay import tiny_model
from torch.utils.data import BatchSampler, SequentialSampler
from train_toys import tiny_qwen, toy_recipe

from sft.models.row_shares import TokenCosts, sharing_problems
from sft.train.collator import PackedCollator, PaddedCollator
from sft.train.parallel.balance import balanced_cuts
from sft.train.parallel.collate import ShareCollator, shared_rows
from sft.train.parallel.cut import RowCut, overlaps
from sft.train.parallel.exchange import Ranks
from sft.train.parallel.groups import DataRanks, SameBlocks
from sft.utils.errors import UsageError, UserError

COSTS = TokenCosts(self_decoder=1000.0, cross_decoder=800.0, key=1.0, head=300.0)


def random_cut(seed: int) -> RowCut:
    rng = random.Random(seed)
    borders = [0]
    for _ in range(rng.randint(1, 6)):
        borders.append(borders[-1] + rng.choice((0, 1, 2, rng.randint(3, 20))))
    ranks = rng.randint(1, 5)
    inner = sorted(rng.randint(0, borders[-1]) for _ in range(ranks - 1))
    return RowCut(tuple(borders), (0, *inner, borders[-1]))


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_says_of_every_token_what_it_lacks(seed):
    """Against the definition, token by token."""
    cut = random_cut(seed)
    document = np.repeat(np.arange(len(cut.borders) - 1), np.diff(cut.borders))
    owner = np.repeat(np.arange(cut.ranks), np.diff(cut.cuts))
    for rank in range(cut.ranks):
        start, end = cut.share(rank)
        starts = [t for t in range(start + 1, end) if document[t] != document[t - 1]]
        assert cut.borders_of(rank) == [0, *(t - start for t in starts), end - start]
        before = [t for t in range(start) if end > start and document[t] == document[start]]
        first, last = cut.carried(rank)
        assert list(range(first, last)) == before
        assert [r for r in range(*cut.states_before()[rank]) if cut.share(r)[0] < cut.share(r)[1]] == sorted(
            set(owner[before])
        )
        assert [list(range(*cut.before(3)[rank])), list(range(*cut.before()[rank]))] == [before[-3:], before]
        goes_on = start < end < len(document) and document[end] == document[end - 1]
        last_one = [t for t in range(start, end) if goes_on and document[t] == document[end]]
        assert list(range(start + cut.last_part(rank), end)) == last_one
        assert cut.passes_through(rank) == (bool(before) and len(last_one) == end - start > 0)


def test_overlaps_are_counted_from_each_part():
    assert overlaps((0, 4, 4, 9), (2, 7)) == [(2, 4), (0, 0), (0, 3)]
    assert overlaps((0, 4), (4, 4)) == [(0, 0)]


def shares(seed: int, ranks: int, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row as it is, and in shares."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, size=4)
    total = int(lengths.sum())
    row: dict[str, Any] = {"input_ids": rng.integers(5, 90, size=total), "seq_lengths": lengths.tolist()}
    row["assistant_masks"] = (rng.random(total) < 0.4).astype(int)
    if options.pop("weights", False):
        row["loss_weights"] = rng.random(total)
    collator = PackedCollator(0, **options)
    return collator([row]), [ShareCollator(collator, COSTS, rank, ranks)([row]) for rank in range(ranks)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ranks", [2, 5])
def test_shares_are_the_row_and_count_each_token_once(seed, ranks):
    whole, parts = shares(seed, ranks, weights=seed % 2 == 1, normalize="sample" if seed > 3 else "token")
    for name in ("input_ids", "position_ids", "seq_idx"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole[name])
    for name in ("num_tokens", "num_supervised"):
        assert sum(part[name] for part in parts) == whole[name]
    assert sum(part["num_weighted"] for part in parts) == pytest.approx(whole["num_weighted"], rel=1e-12)
    targets = torch.cat([part["shift_labels"] for part in parts], dim=1)
    assert torch.equal(targets[:, :-1], whole["labels"][:, 1:]) and targets[0, -1] == -100
    if "loss_weights" in whole:
        said = torch.cat([part["loss_weights"] for part in parts], dim=1)
        assert torch.equal(said[:, :-1], whole["loss_weights"][:, 1:])
    assert {part["row_supervised"] for part in parts} == {whole["num_supervised"]}
    assert len({part["row_cut"] for part in parts}) == 1
    assert all("labels" not in part for part in parts)


def test_a_row_without_a_token_is_shared_and_counts_for_nothing():
    empty = {"input_ids": [], "assistant_masks": [], "seq_lengths": []}
    parts = [ShareCollator(PackedCollator(0), COSTS, rank, 3)([empty]) for rank in range(3)]
    assert [part["num_tokens"] for part in parts] == [0, 0, 0]
    assert sum(part["input_ids"].shape[1] for part in parts) == 2


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shares_cost_the_same_and_late_ones_are_shorter(ranks):
    """By the definition: a token's cost with the keys it sees, and of those before the first target less."""
    lengths, supervised = np.array([700, 100, 1200]), np.zeros(2000, dtype=bool)
    supervised[300:700], supervised[1200:1999:3] = True, True
    cuts = balanced_cuts(lengths, supervised, COSTS, ranks)
    cost = np.full(2000, COSTS.self_decoder)
    for start, end in ((0, 700), (700, 800), (800, 2000)):
        first = next((t for t in range(start, end) if supervised[t]), end)
        cost[first:end] += COSTS.cross_decoder + COSTS.key * (np.arange(first, end) - start + 1)
    cost[supervised] += COSTS.head
    parts = [cost[first:last].sum() for first, last in pairwise(cuts)]
    assert max(parts) - min(parts) <= 2 * cost.max()
    long = balanced_cuts(np.array([4000]), np.ones(4000, dtype=bool), COSTS, ranks)
    assert (np.diff(np.diff(long)) < 0).all()


def test_costs_are_those_of_the_matrices_that_run():
    """Against the parameters: a linear layer's is a multiply-add for each of its weights."""
    model = tiny_model(sliding_window=24)
    costs, config = TokenCosts.of(model), model.config
    assert costs is not None
    matrices = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    window_keys = 3 * config.hidden_size * sum(config.window(layer) or 0 for layer in range(8))
    assert costs.self_decoder + costs.cross_decoder == matrices + window_keys
    above = sum(m.weight.numel() for m in model.model.layers[6:].modules() if isinstance(m, torch.nn.Linear))
    shared = model.model.layers[5]
    keys = 2 * config.num_key_value_heads * config.head_dim * config.hidden_size
    own = sum(m.weight.numel() for m in shared.modules() if isinstance(m, torch.nn.Linear)) - keys
    assert costs.cross_decoder == above + own
    assert (costs.key, costs.head) == (2 * 3 * 32, 96 * 32)


@pytest.mark.parametrize("times", [1, 2, 4])
def test_ranks_of_a_group_get_the_same_rows(times):
    """As accelerate deals micro-batches out: in turn."""
    order = SameBlocks(SequentialSampler(range(26)), 3, times)
    batches = list(BatchSampler(order, 3, drop_last=True))
    world = 4
    dealt = [batches[rank::world][: len(batches) // world] for rank in range(world)]
    for rank in range(world):
        assert dealt[rank] == dealt[rank // times * times]
    rows = [row for rank in range(0, world, times) for batch in dealt[rank] for row in batch]
    assert len(rows) == len(set(rows)) == 24
    assert len(order) == len(list(order)) == 24 * times


def test_data_ranks_are_the_groups(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (DataRanks.of(2), DataRanks.of(1)) == (DataRanks(2, 4), DataRanks(5, 8))


def test_what_cant_be_shared_is_refused(tmp_path):
    ranks = Ranks(0, 2)
    with pytest.raises(UserError, match="Qwen3ForCausalLM can't share a row between processes"):
        shared_rows(PackedCollator(0), tiny_qwen(), ranks, "one")
    with pytest.raises(UserError, match="only packed rows can be shared"):
        shared_rows(PaddedCollator(0), tiny_model(), ranks, "one")
    tiny_qwen().save_pretrained(tmp_path / "start")
    recipe = toy_recipe(tmp_path, {}, {"sequence_parallel_size": 2})
    (problem,) = sharing_problems(recipe)
    assert problem.loc == ("stages", 1, "train", "sequence_parallel_size") and "Qwen3ForCausalLM" in problem.message
    tiny_model().save_pretrained(tmp_path / "start")
    assert list(sharing_problems(recipe)) == []


def test_a_size_that_the_processes_dont_fill_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    from sft.train.arguments import check_arguments

    stage = toy_recipe(tmp_path, {"sequence_parallel_size": 2}).stages[0]
    monkeypatch.setattr("sft.train.arguments.world_size", lambda: 3)
    with pytest.raises(
        UsageError, match=r"sequence_parallel_size: 2 processes share a row, and the run has 3: start a"
    ):
        check_arguments(stage)
    monkeypatch.setattr("sft.train.arguments.world_size", lambda: 4)
    check_arguments(stage)


def test_the_model_refuses_a_share_that_it_cant_honour():
    model, ids = tiny_model(), torch.arange(5)[None]
    share: Any = SimpleNamespace()
    with pytest.raises(ValueError, match="tells its documents by cu_seq_lens_q"):
        model(input_ids=ids, row_share=share)
    borders = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="row_share needs shift_labels"):
        model(input_ids=ids, labels=ids, cu_seq_lens_q=borders, row_share=share)
