"""Which bytes a model learns from, and which are held out."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from retention.lm import data
from retention.lm.errors import UsageError


def write(folder: Path, count: int, size: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        # The file's number is its only byte, so a stream tells which files are in it.
        (folder / f"{i:03d}.txt").write_bytes(bytes([i + 1]) * size)


def members(stream: torch.Tensor) -> set[int]:
    return set(stream.tolist()) - {0}


def test_files_are_held_out_whole_and_by_their_names_alone(tmp_path: Path):
    write(tmp_path / "a", 200)
    corpus = data.load_corpus([str(tmp_path / "a")], 32)
    train, held_out = members(corpus.train), members(corpus.validation)
    assert train | held_out == set(range(1, 201))
    assert not train & held_out
    assert 3 <= len(held_out) <= 20  # one in twenty of 200, by a hash
    assert corpus.held_out_files == len(held_out)
    assert len(corpus.train) == len(train) * 101  # each file after a separator

    write(tmp_path / "moved" / "b", 200)  # elsewhere, and a third of them gone
    gone = set(range(1, 201, 3))
    for x in gone:
        (tmp_path / "moved" / "b" / f"{x - 1:03d}.txt").unlink()
    moved = data.load_corpus([str(tmp_path / "moved" / "b")], 32)
    assert members(moved.validation) == held_out - gone


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_files_still_give_both_sides(tmp_path: Path, count: int):
    write(tmp_path, count)
    corpus = data.load_corpus([str(tmp_path)], 32)
    assert len(members(corpus.train)) + len(members(corpus.validation)) == count
    assert members(corpus.train)
    assert members(corpus.validation)


def test_a_single_file_keeps_its_tail_back(tmp_path: Path):
    content = bytes(range(200)) * 5
    (tmp_path / "one.txt").write_bytes(content)
    corpus = data.load_corpus([str(tmp_path / "one.txt")], 32)
    assert bytes(corpus.train.tolist()) == content[:900]
    assert bytes(corpus.validation.tolist()) == content[900:]


def test_hidden_and_binary_files_are_passed_over_unless_named(tmp_path: Path):
    write(tmp_path, 2)
    (tmp_path / "image.bin").write_bytes(b"\xc8\0" * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\xc9" * 100)
    (tmp_path / ".hidden").write_bytes(b"\xca" * 100)
    corpus = data.load_corpus([str(tmp_path)], 32)
    assert members(corpus.train) | members(corpus.validation) == {1, 2}
    named = data.load_corpus([str(tmp_path), str(tmp_path / "image.bin")], 32)
    assert members(named.train) | members(named.validation) == {1, 2, 0xC8}


def test_a_file_named_twice_counts_once(tmp_path: Path):
    write(tmp_path, 3)
    once = data.load_corpus([str(tmp_path)], 32)
    twice = data.load_corpus([str(tmp_path), str(tmp_path / "000.txt")], 32)
    assert twice.sha256 == once.sha256


def test_standard_library_is_python_without_tests_or_packages():
    names = [name for name, _ in data._standard_library()]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "__pycache__"}
    corpus = data.load_corpus(None, 256)
    assert len(corpus.train) > 10 * len(corpus.validation) > 1_000_000
    # Byte frequencies of source text: below the 5.5 nats of a uniform byte, well above 2.
    assert 2.8 < corpus.byte_frequency_loss < 3.8


def test_byte_frequency_loss_is_a_cross_entropy(tmp_path: Path):
    (tmp_path / "one").write_bytes(b"aaab" * 250_000)
    corpus = data.load_corpus([str(tmp_path / "one")], 4)
    wanted = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    # One is added to each of 256 counts of 900,000 bytes.
    assert corpus.byte_frequency_loss == pytest.approx(wanted, rel=1e-3)


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path):
    (tmp_path / "one").write_bytes(os.urandom(5000))
    corpus = data.load_corpus([str(tmp_path / "one")], 16)
    first = data.batch(corpus, 3, 7, 4, 16)
    torch.manual_seed(1)
    data.batch(corpus, 3, 8, 4, 16)
    assert torch.equal(data.batch(corpus, 3, 7, 4, 16), first)
    assert not torch.equal(data.batch(corpus, 3, 8, 4, 16), first)
    assert not torch.equal(data.batch(corpus, 4, 7, 4, 16), first)
    assert first.shape == (4, 17)
    stream = bytes(corpus.train.tolist())
    assert all(bytes(row) in stream for row in first.tolist())


def test_batches_reach_both_ends(tmp_path: Path):
    (tmp_path / "one").write_bytes(bytes(range(40)))
    corpus = data.load_corpus([str(tmp_path / "one")], 3)
    seen = torch.cat([data.batch(corpus, 0, step, 64, 3) for step in range(20)])
    assert seen.min() == 0
    assert seen.max() == 35  # the last tenth is held out


@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_validation_windows_are_spread_and_the_same(tmp_path: Path, blocks: int):
    (tmp_path / "one").write_bytes(bytes(range(250)) * 4)
    corpus = data.load_corpus([str(tmp_path / "one")], 9)  # 100 bytes held out
    parts = list(data.validation_batches(corpus, blocks, 4, 9))
    windows = torch.cat(parts)
    assert len(windows) == min(blocks, 11)
    assert all(len(part) <= 4 for part in parts)
    assert torch.equal(windows[0], corpus.validation[:10].long())
    if blocks > 1:
        assert torch.equal(windows[-1], corpus.validation[-10:].long())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: [str(d / "none")], r"--data: no such file or folder: .*none"),
        (lambda d: [""], r"--data: no such file or folder: ''"),
        (lambda d: [str(d)], r"--data: no text files in"),
        (lambda d: [str((d / "e").write_bytes(b"") or d / "e")], r"--data: .* holds no bytes"),
        (
            lambda d: [str((d / "s").write_bytes(b"x" * 50) and d / "s")],
            r"--block-size: 64 is longer than the data, which has 45 bytes to train on",
        ),
        (
            lambda d: [str((d / "s").write_bytes(b"x" * 500) and d / "s")],
            r"--block-size: 64 is longer than the data, which has 50 bytes held out",
        ),
    ],
)
def test_unusable_data(tmp_path: Path, make, message: str):
    with pytest.raises(UsageError, match=message):
        data.load_corpus(make(tmp_path), 64)


def test_unreadable_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 500)

    def refuse(self: Path) -> bytes:  # root reads everything, whatever the file's mode
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"--data: cannot read .*secret: Permission denied"):
        data.load_corpus([str(path)], 8)
