"""Compiled blocks on two ranks at every ZeRO stage: the weights of one uncompiled rank."""

import pytest
import torch.distributed as dist

from kinema.distributed.activations import ActivationCheckpointing
from kinema.distributed.compiling import Compilations
from tests.distributed.test_dit_engine import MODELS, largest_difference
from tests.ranks import run_ranks
from tests.unit.test_compile import traced

STAGES = (0, 1, 2), (3,)
"""In one process each: the linear layer that DeepSpeed brings for ZeRO 3 is another, and is compiled anew."""


def compare(name: str, stages: tuple[int, ...]) -> tuple[dict[tuple[int, str], float], list[int]]:
    """The largest difference at each stage, with blocks kept and computed again; graphs compiled by the end of each."""
    counted, differences, graphs = Compilations(), {}, []
    for stage in stages:
        for kind in (ActivationCheckpointing.none, ActivationCheckpointing.full):
            off = largest_difference(name, stage, dist.get_rank(), compile_by=traced, kind=kind)
            differences[stage, kind.value] = off
            graphs.append(counted.count())
    return differences, graphs


@pytest.mark.distributed
@pytest.mark.soak
@pytest.mark.parametrize("stages", STAGES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_learn_the_same_at_every_stage(name, stages):
    for differences, graphs in run_ranks(compare, 2, name, stages, timeout_seconds=1200):
        print(name, differences, graphs)
        assert max(differences.values()) < 5e-3  # float32 against float64, as uncompiled
        assert len(set(graphs)) == 1  # none of the later ones compiles anything anew
