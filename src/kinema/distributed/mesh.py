"""The ranks of a job as data x sequence: who reads which clips, and with whom a rank works on one pack."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Where one rank stands. Consecutive ranks, which a node's fast links join, form a sequence group.

    Its ranks are given the same packs and draw the same noise, so that only one of them counts what was seen.
    """

    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1
    sequence_group: dist.ProcessGroup | None = None
    """None where a rank works on its packs alone."""

    @property
    def counts(self) -> bool:
        """Whether clips, tokens and losses that this rank saw enter sums over all ranks."""
        return self.sequence_rank == 0


def data_ranks(world_size: int, sequence_degree: int) -> int:
    """How many groups of ranks get packs of their own; ValueError where some ranks would be left over."""
    if world_size % sequence_degree:
        usable = [degree for degree in range(1, world_size + 1) if world_size % degree == 0]
        raise ValueError(
            f"parallel.sequence_degree={sequence_degree} must divide the number of ranks, {world_size}: each group of "
            f"so many works on one pack. Type one of {usable}, or start a multiple of {sequence_degree} ranks."
        )
    return world_size // sequence_degree


def make_mesh(sequence_degree: int) -> Mesh:
    """The mesh of this job, seen from this rank; a collective, since the groups are made by all ranks together."""
    data_size = data_ranks(dist.get_world_size(), sequence_degree)
    data_rank, sequence_rank = divmod(dist.get_rank(), sequence_degree)
    group = dist.new_subgroups(sequence_degree)[0] if sequence_degree > 1 else None
    return Mesh(data_rank, data_size, sequence_rank, sequence_degree, group)
