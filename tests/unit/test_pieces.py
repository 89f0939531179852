"""Tensors that several ranks write in parts are one tensor to whoever reads them, and damage never passes."""

import resource
import zlib

import pytest
import safetensors.torch
import torch

from kinema.distributed.layout import Fragment
from kinema.identity import fingerprint_like, fingerprint_of_checksums
from kinema.training.checkpoints.pieces import Piece, PieceError, StoredTensors, share, whole, whole_sums, write_pieces
from kinema.training.checkpoints.saving import reader


def tensors():
    draw = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(3, 5, generator=draw),
        "vector": torch.randn(7, generator=draw),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5, generator=draw).bfloat16(),
        "odd@1": torch.arange(3),
    }


def write(folder, ranks, content=None):
    """What each of `ranks` ranks writes of the tensors; paths and the checksums of all pieces."""
    pieces = [whole(name, value) for name, value in (content or tensors()).items()]
    paths = [folder / f"{rank}.safetensors" for rank in range(ranks)]
    written = [write_pieces(path, list(share(pieces, rank, ranks))) for rank, path in enumerate(paths)]
    return paths, written


@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_whatever_ranks_write_reads_as_whole_tensors(tmp_path, ranks):
    paths, written = write(tmp_path, ranks)
    with StoredTensors(paths) as stored:
        assert stored.shapes == {name: tuple(value.shape) for name, value in tensors().items()}
        for name, value in tensors().items():
            found = stored.full(name)
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
        part = torch.zeros(9)
        stored.read(part, "matrix", 4)
        assert torch.equal(part, tensors()["matrix"].view(-1)[4:13])
    for path, own in zip(paths, written, strict=True):
        content = path.read_bytes()
        assert (len(content), zlib.crc32(content)) == (own.num_bytes, own.crc32)
        safetensors.torch.load(content)  # any reader of the format takes it
    sums = whole_sums(one for own in written for one in own.sums)
    mark = fingerprint_of_checksums({name: (one.shape, one.dtype, one.crc32) for name, one in sums.items()})
    assert fingerprint_like(mark, tensors()) == mark
    changed = tensors()
    changed["vector"][3] += 1e-6
    assert fingerprint_like(mark, changed) != mark


def test_shares_are_even_and_of_one_rank_whole():
    pieces = [whole(name, torch.zeros(size)) for name, size in {"a": 10, "b": 1000, "c": 33}.items()]
    sizes = [sum(piece.values.numel() for piece in share(pieces, rank, 4)) for rank in range(4)]
    assert sum(sizes) == 1043
    assert max(sizes) - min(sizes) <= 1
    assert all(piece.is_whole for piece in share(pieces, 0, 1))


def test_missing_and_doubled_pieces_are_refused(tmp_path):
    paths, written = write(tmp_path, 3)
    with pytest.raises(PieceError, match="do not make"):
        StoredTensors(paths[1:])
    with pytest.raises(PieceError, match="do not make"):
        StoredTensors([*paths, paths[0]])
    with pytest.raises(PieceError, match="comes next"):
        whole_sums(one for own in written[1:] for one in own.sums)
    with pytest.raises(PieceError, match="were written"):
        whole_sums(one for own in written[:1] for one in own.sums)


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    paths, _ = write(tmp_path, 1)
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(PieceError, match=r"0\.safetensors is no file of tensors"):
        StoredTensors(paths)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_written(tmp_path, number):
    with pytest.raises(PieceError, match="weight holds a number that is not finite"):
        write_pieces(tmp_path / "x", [whole("weight", torch.tensor([1.0, number]))])


def test_a_run_never_goes_on_from_a_number_that_is_not_finite(tmp_path):
    safetensors.torch.save_file({"w": torch.tensor([1.0, 2.0, float("nan")])}, tmp_path / "x")
    with StoredTensors([tmp_path / "x"]) as stored:
        fill, target = reader(stored), torch.zeros(2)
        fill(Fragment("w", torch.Size([3]), 0, 2, 0, 0), target)
        assert target.tolist() == [1.0, 2.0]
        with pytest.raises(PieceError, match="w holds a number that is not finite"):
            fill(Fragment("w", torch.Size([3]), 1, 2, 0, 0), target)


def test_writing_and_reading_a_part_need_no_second_copy(tmp_path):
    """Peak memory of the process; the kernel counts pages of files that are mapped, too."""
    big = torch.ones(64 << 20 >> 2)
    write(tmp_path, 1, {"small": torch.ones(4)})  # so that nothing is loaded for the first time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_pieces(tmp_path / "big", [Piece("w", (big.numel() * 2,), 0, big)])
    write_pieces(tmp_path / "rest", [Piece("w", (big.numel() * 2,), big.numel(), big)])
    with StoredTensors([tmp_path / "big", tmp_path / "rest"]) as stored:
        stored.read(torch.empty(1000), "w", big.numel() - 500)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10  # KiB; a copy would be 64 MiB
