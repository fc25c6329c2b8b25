"""Averages of model folders: a float64 average rounded once, in little memory, whatever the files look like."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft.models import average
from sft.models.average import Average, average_into, rounded_once
from sft.utils.errors import UserError

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def folder(path: Path, seed: int, dtype: torch.dtype, **more: Tensor) -> Path:
    """A model's weights: a matrix, a vector, a number, and whole numbers."""
    path.mkdir()
    g = torch.Generator().manual_seed(seed)
    tensors = {"a": torch.randn(17, 9, generator=g).to(dtype), "b": torch.randn(5, generator=g)}
    tensors |= {"c": torch.randn((), generator=g).to(dtype), "n": torch.tensor([seed, 2]), **more}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """The value of `dtype` that is nearest to an exact one, found among the neighbours of a rough guess."""
    guess = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    around = [guess, *(torch.nextafter(guess.float(), torch.tensor(way)).to(dtype) for way in (1e30, -1e30))]
    bits = guess.view(torch.int16 if dtype != torch.float32 else torch.int32)
    around += [(bits + step).view(dtype) for step in (-1, 1)]
    return min((float(x) for x in around if x.isfinite()), key=lambda x: abs(Fraction(x) - value))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_uniform_is_the_float64_mean_rounded_once(
    tmp_path: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average, "PIECE", piece)
    folders = [folder(tmp_path / f"{n}", n, dtype) for n in range(3)]
    target = folder(tmp_path / "target", 9, dtype)
    average_into(target, Average(folders))
    found, parts = load_file(target / "model.safetensors"), [load_file(one / "model.safetensors") for one in folders]
    for name in ("a", "b", "c"):
        mean = torch.stack([part[name].double() for part in parts]).sum(0) / 3
        wanted = [nearest(Fraction(x), found[name].dtype) for x in mean.flatten().tolist()]
        assert found[name].dtype == parts[0][name].dtype and found[name].flatten().tolist() == wanted
    assert found["n"].tolist() == [2, 2], "whole numbers are the last one's"


def test_with_the_start_and_a_weight(tmp_path: Path) -> None:
    """WiSE-FT: of the weights that are there, or of several checkpoints."""
    start, one, two = (folder(tmp_path / f"{n}", n, torch.float32) for n in range(3))
    target = folder(tmp_path / "target", 7, torch.float32)
    own = load_file(target / "model.safetensors")["a"].double()
    s, x, y = (load_file(path / "model.safetensors")["a"].double() for path in (start, one, two))
    average_into(target, Average(start=start, weight=0.3))
    assert torch.equal(load_file(target / "model.safetensors")["a"], (0.3 * own + (1 - 0.3) * s).float())
    average_into(target, Average([one, two], start, 0.75))
    assert torch.equal(load_file(target / "model.safetensors")["a"], (0.75 * (x + y) / 2 + 0.25 * s).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_not_rounded_by_way_of_float32(dtype: torch.dtype) -> None:
    """A hair above the middle between two: float32 would make it the middle, and that goes to the even one."""
    ulp = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    hair = 2.0**-40
    middle = 1 + ulp / 2
    values = torch.tensor([middle + hair, -middle - hair, middle + ulp - hair, middle, 0.0, 1e300], dtype=torch.float64)
    assert rounded_once(values, dtype).tolist() == [1 + ulp, -(1 + ulp), 1 + ulp, 1.0, 0.0, float("inf")]
    assert rounded_once(values, dtype).tolist()[0] != values.to(dtype).tolist()[0]
    g = torch.Generator().manual_seed(0)
    some = torch.randn(2000, generator=g, dtype=torch.float64) * 10 ** torch.randint(-6, 4, (2000,), generator=g)
    assert rounded_once(some, dtype).tolist() == [nearest(Fraction(x), dtype) for x in some.tolist()]


def test_shards_of_one_folder_meet_the_single_file_of_another(tmp_path: Path) -> None:
    one, target = (folder(tmp_path / name, n, torch.float32) for n, name in enumerate(("one", "target")))
    tensors = load_file(one / "model.safetensors")
    (one / "model.safetensors").unlink()
    for number, names in enumerate((["a"], ["b", "c", "n"]), start=1):
        save_file({name: tensors[name] for name in names}, one / f"model-0000{number}-of-00002.safetensors")
    average_into(target, Average([one]))
    found = load_file(target / "model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    one, target = folder(tmp_path / "one", 1, torch.float32), folder(tmp_path / "target", 2, torch.float32)
    before = (target / "model.safetensors").read_bytes()
    other = folder(tmp_path / "other", 3, torch.float32)
    save_file({**load_file(one / "model.safetensors"), "a": torch.ones(3)}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"a of shape \[17, 9\] can't be averaged: .*other has one of shape \[3\]"):
        average_into(target, Average([one, other]))
    save_file({"b": torch.ones(5)}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"can't be averaged: .*other has none"):
        average_into(target, Average([one, other]))
    content = (one / "model.safetensors").read_bytes()
    (one / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(UserError, match="is cut off"):
        average_into(target, Average([one]))
    assert (target / "model.safetensors").read_bytes() == before


LARGE = """
import json, resource, sys
from pathlib import Path
from sft.models.average import Average, average_into
root = Path(sys.argv[1])
average_into(root / "target", Average([root / "0", root / "1"], root / "start", 0.5))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def sparse(path: Path, shapes: dict[str, list[int]], value: int) -> None:
    """A model of zeros in bfloat16 that takes no room on the disk, with one value at the end of each tensor."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.mkdir()
    with open(path / "model.safetensors", "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)
        for entry in header.values():
            handle.seek(8 + len(text) + entry["data_offsets"][1] - 2)
            handle.write(torch.tensor([value]).bfloat16().view(torch.uint8).numpy().tobytes())


def peak_of_averaging(root: Path, shapes: dict[str, list[int]]) -> int:
    """Bytes that a process of its own takes to average three models into a fourth; the values are looked at."""
    for name, value in (("0", 1), ("1", 2), ("start", 4), ("target", 0)):
        sparse(root / name, shapes, value)
    command = [sys.executable, "-c", LARGE, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=True)
    with open(root / "target/model.safetensors", "rb") as handle:
        handle.seek(-2, 2)
        assert torch.frombuffer(bytearray(handle.read()), dtype=torch.bfloat16).item() == 0.5 * 1.5 + 0.5 * 4
    return int(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 400 MB, which as a whole would take 3.2 GB in float64 with its parents."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    small = peak_of_averaging(tmp_path / "small", {"embed": [8, 8]})
    assert peak_of_averaging(tmp_path / "large", {"embed": [200_000, 1000]}) < small + 700_000_000


@pytest.mark.slow
def test_a_checkpoint_of_the_published_size_in_a_gigabyte_and_a_half(tmp_path: Path) -> None:
    """7.7 GB: the embeddings of 200,064 words and 32 layers of the published width."""
    shapes = {"embed": [200_064, 2560], **{f"layer.{n}": [41_000, 2560] for n in range(32)}}
    assert sum(2 * rows * width for rows, width in shapes.values()) > 7.7e9
    assert peak_of_averaging(tmp_path, shapes) < 1_500_000_000
