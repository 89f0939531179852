"""Which clips the published pairs of VAE and transformer take, by strides and patches out of their configs."""

import dataclasses

import pytest
import torch

from kinema.interop.presets import PRESETS
from kinema.sampling.sample import geometry_of
from tests.parity.test_dit_presets import CASES, meta_record
from tests.parity.test_vae_presets import CASES as VAE_CASES
from tests.parity.test_vae_presets import make_reference

BY_NAME = {preset.name: preset for preset in PRESETS}


@dataclasses.dataclass
class Pair:
    """A released pair, a clip that it was made for, and one that it cannot take."""

    vae: str
    case: str
    release: str
    strides: tuple[int, int]
    frames: str
    clip: tuple[int, int, int]
    tokens: int
    illegal: tuple[int, int, int]
    nearest: list[list[int]]


PAIRS = {
    "Wan 2.1": Pair("wan_vae", "wan", "1.3B", (4, 8), "4k+1", (81, 480, 832), 21 * 30 * 52, (80, 480, 832),
                    [[81, 480, 832], [77, 480, 832]]),
    "Wan 2.2 5B": Pair("wan_22_vae", "wan, a timestep for each frame", "2.2 TI2V 5B", (4, 16), "4k+1",
                       (121, 704, 1280), 31 * 22 * 40, (121, 720, 1280), [[121, 736, 1280], [121, 704, 1280]]),
    "HunyuanVideo": Pair("hunyuan_vae", "hunyuan", "13B", (4, 8), "4k+1", (129, 720, 1280), 33 * 45 * 80,
                         (129, 720, 1288), [[129, 720, 1296], [129, 720, 1280]]),
    "HunyuanVideo-1.5's VAE": Pair("hunyuan_15_vae", "ltx", "2B", (4, 16), "4k+1", (121, 480, 848), 31 * 30 * 53,
                                   (121, 480, 840), [[121, 480, 848], [121, 480, 832]]),
    "LTX": Pair("ltx2_vae", "ltx", "13B", (8, 32), "8k+1", (121, 512, 768), 16 * 16 * 24, (120, 512, 768),
                [[121, 512, 768], [113, 512, 768]]),
    "CogVideoX 1.5's patches": Pair("wan_vae", "cogvideox 1.5", "1.5 5B", (4, 8), "8k+5", (85, 768, 1360),
                                    11 * 48 * 85, (81, 768, 1360), [[85, 768, 1360], [77, 768, 1360]]),
}  # fmt: skip


def geometry(pair):
    """From the published configs, without weights."""
    case, vae_case = CASES[pair.case], next(case for case in VAE_CASES if case.preset == pair.vae)
    with torch.device("meta"):
        vae = BY_NAME[pair.vae].build(make_reference(vae_case, vae_case.released)[1])
        model = BY_NAME[case.preset].build(meta_record(case, case.released[pair.release])[0])
    return geometry_of(vae.geometry_strides, model.config)


@pytest.mark.parametrize("name", PAIRS)
def test_a_published_pair_takes_its_own_clips_and_names_the_nearest_of_others(name):
    pair = PAIRS[name]
    found = geometry(pair)
    assert (found.temporal_stride, found.spatial_stride) == pair.strides
    assert found.describe()["frames"] == pair.frames
    assert found.num_tokens(pair.clip) == pair.tokens
    with pytest.raises(ValueError, match=r"does not fit the VAE .* Nearest legal: ") as refusal:
        found.check(pair.illegal)
    assert f"Nearest legal: {str(pair.nearest)[1:-1]}" in str(refusal.value)
    for near in pair.nearest:
        found.check(near)
