"""Loading says in one sentence what is wrong with a checkpoint, before or instead of using it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sambay import tiny_model

from sft.models.load import load_checkpoint, load_model, read_config
from sft.tokenizers.load import load_tokenizer
from sft.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def test_a_whole_checkpoint_loads(folder):
    assert sum(p.numel() for p in load_checkpoint(str(folder), dtype="float32").parameters()) > 0


def test_sharded_checkpoints_load_and_a_missing_shard_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    load_checkpoint(str(tmp_path))
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("part", [0.5, 0.99, 0.0001])
def test_a_file_cut_off_is_named(folder, part):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=r"model\.safetensors is (cut off|broken)"):
        load_checkpoint(str(folder))


def test_missing_parts_are_named(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.5.attn.Wqkv.bias")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors are missing.*layers\.5\.attn\.Wqkv\.bias"):
        load_checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_checkpoint(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="it has no config"):
        load_checkpoint(str(folder))
    with pytest.raises(UserError, match="no model folder at"):
        load_checkpoint(str(tmp_path / "nothing"))


def test_a_missing_tokenizer_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(folder))
    with pytest.raises(UserError, match="no tokenizer folder at"):
        load_tokenizer(str(tmp_path / "nothing"))


class Tokenizer:
    pad_token_id = bos_token_id = eos_token_id = 1

    def __len__(self):
        return 70

    def get_vocab(self):
        return {"<|end|>": 2}


def section(**config):
    return SimpleNamespace(model_name_or_path=None, config=config, dtype="float32")


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_from_scratch_is_seeded_and_fits_the_tokenizer():
    before = torch.get_rng_state()
    one, two, other = (load_model(section(**SMALL), Tokenizer(), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.model.embed_tokens.weight for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.config.vocab_size == 128
    assert one.generation_config.eos_token_id == [2, 1]


def write_header(file, header):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content)


@pytest.mark.parametrize(
    "header",
    [
        [], [1, 2], "text", 7, None, b"\xff\xfe{}", b"{", b"[" * 100_000, {"a": 1}, {"a": []}, {"a": {}},
        {"a": {"data_offsets": 4}}, {"a": {"data_offsets": [4]}}, {"a": {"data_offsets": [4, 0]}},
        {"a": {"data_offsets": [-4, 0]}}, {"a": {"data_offsets": ["0", "4"]}}, {"a": {"data_offsets": [0, 4.5]}},
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_one_sentence(folder, header):
    write_header(folder / "model.safetensors", header)
    with pytest.raises(UserError, match=r"model\.safetensors is broken: [^\n]*$"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    "content",
    ["[]", "7", "null", "{", "", '"text"', "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
     '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": ""}}'],
)  # fmt: skip
def test_an_index_that_is_none_is_one_sentence(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is broken: [^\n]*$"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("content", ["[]", "7", "null", "{", "", '"text"'])
def test_a_configuration_that_is_none_is_one_sentence(folder, content):
    (folder / "config.json").write_text(content)
    for read in (lambda: load_checkpoint(str(folder)), lambda: read_config(folder)):
        with pytest.raises(UserError, match=r"config\.json is broken: [^\n]*$"):
            read()


@pytest.mark.parametrize("changed", [{"hidden_size": 0}, {"vocab_size": "96"}, {"num_hidden_layers": -4}])
def test_an_absurd_configuration_in_a_checkpoint_is_one_sentence(folder, changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError, match=rf"can't be loaded: {next(iter(changed))} must be a whole number[^\n]*$"):
        load_checkpoint(str(folder))


def test_a_model_too_large_for_any_machine_is_one_sentence():
    with pytest.raises(UserError, match=r"^model\.config: a model of this size can't be made[^\n]*$"):
        load_model(section(**{**SMALL, "hidden_size": 2**30, "vocab_size": 2**31 - 1}), Tokenizer())


@pytest.mark.parametrize(
    "bad", [{"hidden_size": 33}, {"vocab_size": 10}, {"hidden_size": 0}, {"num_attention_heads": "4"}]
)
def test_a_bad_configuration_is_one_sentence(bad):
    with pytest.raises(UserError, match=r"model\.config"):
        load_model(section(**{**SMALL, **bad}), Tokenizer())


@pytest.mark.parametrize(("local", "gpus", "own"), [(None, 2, []), ("0", 2, [0]), ("1", 2, [1]), ("3", 1, [0])])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch, local, gpus, own) -> None:
    """Slurm may show each process its own one only, which is then number 0 to all."""
    from sft.models.load import on_device

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(model, "to", lambda device: model if device == "cuda" else None, raising=False)
    assert on_device(model) is model and not model.training and taken == own
