"""The bytes a model learns from: which files, which of them are held out, and each step's batch."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from retention.lm.errors import UsageError
from retention.lm.files import explained, status

SEPARATOR = b"\0"  # between files, and what an empty prompt starts from
_HELD_OUT_OF_1000 = 50
_HELD_OUT_TAIL = 0.1
_BINARY_PROBE = 8192
_NOT_ITS_OWN = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two streams of bytes, uint8 `[n]` each, and what they were read from."""

    train: Tensor
    validation: Tensor
    files: int
    held_out_files: int
    sha256: str

    @property
    def byte_frequency_loss(self) -> float:
        """Nats a byte on the validation stream, for a model that knows byte frequencies only."""
        seen = torch.bincount(self.train.long(), minlength=256).double() + 1
        log_frequency = (seen / seen.sum()).log()
        met = torch.bincount(self.validation.long(), minlength=256).double()
        return float(-(met * log_frequency).sum() / met.sum())

    def summary(self) -> dict[str, object]:
        """What `config.json` says of the data."""
        return {
            "files": self.files,
            "held_out_files": self.held_out_files,
            "train_bytes": len(self.train),
            "validation_bytes": len(self.validation),
            "byte_frequency_loss": self.byte_frequency_loss,
            "sha256": self.sha256,
        }


def load_corpus(data: Sequence[str] | None, block_size: int) -> Corpus:
    """Read and split the data.

    Of several files, one in twenty is held out, chosen by the hash of its path below the folder it
    was found in, so the choice outlives a move and a changed neighbour. Of a single file, the last
    tenth is.

    Args:
        data: files and folders; None: the Python sources of the running interpreter's own standard
            library. In a folder, hidden files and files with a NUL byte near their start (binary)
            are passed over.
        block_size: tokens a training example predicts; both streams must be longer.

    Raises:
        UsageError: for a path that is not there or cannot be read, no bytes at all, or a stream
            shorter than a block.
    """
    files = _standard_library() if data is None else _user_files(data)
    if not files:
        raise UsageError(f"--data: no text files in {_listed(data)}")
    if not any(content for _, content in files):
        raise UsageError(f"--data: {_listed(data)} holds no bytes")
    whole = hashlib.sha256()
    for name, content in files:
        whole.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        whole.update(content)
    if len(files) == 1:
        held_out = 0
        content = files[0][1]
        cut = len(content) - int(len(content) * _HELD_OUT_TAIL)
        streams = content[:cut], content[cut:]
    else:
        chosen = _held_out([name for name, _ in files])
        held_out = len(chosen)
        streams = (
            b"".join(SEPARATOR + content for name, content in files if name not in chosen),
            b"".join(SEPARATOR + content for name, content in files if name in chosen),
        )
    for stream, role in zip(streams, ("to train on", "held out to validate on"), strict=True):
        if len(stream) <= block_size:
            raise UsageError(
                f"--block-size: {block_size} is longer than the data, "
                f"which has {len(stream)} bytes {role} (at least {block_size + 1} needed)"
            )
    return Corpus(
        train=_as_tensor(streams[0]),
        validation=_as_tensor(streams[1]),
        files=len(files),
        held_out_files=held_out,
        sha256=whole.hexdigest(),
    )


def batch(corpus: Corpus, seed: int, step: int, batch_size: int, block_size: int) -> Tensor:
    """The `[batch_size, block_size + 1]` int64 bytes of a step: a function of seed and step alone.

    That is what lets a resumed run see the very batches of one never stopped.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    starts = torch.randint(
        len(corpus.train) - block_size, (batch_size,), generator=generator, dtype=torch.int64
    )
    return _windows(corpus.train, starts, block_size)


def validation_batches(
    corpus: Corpus, blocks: int, batch_size: int, block_size: int
) -> Iterator[Tensor]:
    """At most `blocks` windows, evenly spread over the validation stream, the same every time."""
    last = len(corpus.validation) - block_size - 1
    count = min(blocks, last // block_size + 1)
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()
    for part in starts.split(batch_size):
        yield _windows(corpus.validation, part, block_size)


def _windows(stream: Tensor, starts: Tensor, block_size: int) -> Tensor:
    return stream[starts[:, None] + torch.arange(block_size + 1)].long()


def _as_tensor(stream: bytes) -> Tensor:
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def _held_out(names: list[str]) -> set[str]:
    def rank(name: str) -> int:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big")

    chosen = {name for name in names if rank(name) % 1000 < _HELD_OUT_OF_1000}
    # Few files can all fall on one side; the hash still picks, so the choice stays the same.
    if not chosen:
        chosen = {min(names, key=rank)}
    if len(chosen) == len(set(names)):
        chosen.remove(max(names, key=rank))
    return chosen


def _standard_library() -> list[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(x for x in inside if x not in _NOT_ITS_OWN)
        names += [Path(folder, x) for x in files if x.endswith(".py")]
    if not names:
        raise UsageError(f"--data: no Python sources in {root}; name a file or a folder")
    return [(path.relative_to(root).as_posix(), _read(path)) for path in sorted(names)]


def _user_files(data: Sequence[str]) -> list[tuple[str, bytes]]:
    found: dict[str, tuple[str, bytes]] = {}
    for given in data:
        # An empty path would be the current folder.
        root = Path(given) if given else None
        with explained(f"--data: cannot read {given!r}"):
            there = status(root) if root else None
        if there is None:
            raise UsageError(f"--data: no such file or folder: {given or repr(given)}")
        if stat.S_ISDIR(there.st_mode):
            for path in _text_files(root):
                content = _read(path)
                if SEPARATOR not in content[:_BINARY_PROBE]:
                    name = path.relative_to(root).as_posix()
                    found.setdefault(os.path.realpath(path), (name, content))
        else:
            found.setdefault(os.path.realpath(root), (root.name, _read(root)))
    return _unique(list(found.values()))


def _unique(files: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Two roots may hold the same relative path: number the later ones."""
    seen: dict[str, int] = {}
    out = []
    for name, content in files:
        seen[name] = seen.get(name, 0) + 1
        out.append((name if seen[name] == 1 else f"{name}#{seen[name]}", content))
    return out


def _text_files(root: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"--data: cannot read {error.filename}: {error.strerror}")

    paths = []
    for folder, inside, files in os.walk(root, onerror=refuse):
        inside[:] = sorted(x for x in inside if not x.startswith(".") and x != "__pycache__")
        paths += [Path(folder, x) for x in files if not x.startswith(".")]
    return sorted(path for path in paths if _is_file(path))


def _is_file(path: Path) -> bool:
    with explained(f"--data: cannot read {path}"):
        found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def _read(path: Path) -> bytes:
    with explained(f"--data: cannot read {path}"):
        return path.read_bytes()


def _listed(data: Sequence[str] | None) -> str:
    return "the standard library" if data is None else ", ".join(data)
