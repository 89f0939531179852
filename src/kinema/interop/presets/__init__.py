"""The published models, one file for each family."""

from kinema.interop.preset import Preset
from kinema.interop.presets.cogvideox import COGVIDEOX
from kinema.interop.presets.cosmos import COSMOS
from kinema.interop.presets.hunyuan import HUNYUAN
from kinema.interop.presets.hunyuan15 import HUNYUAN_15
from kinema.interop.presets.hunyuan_vae import HUNYUAN_15_VAE, HUNYUAN_VAE
from kinema.interop.presets.kandinsky import KANDINSKY
from kinema.interop.presets.latte import LATTE
from kinema.interop.presets.ltx import LTX
from kinema.interop.presets.ltx2 import LTX2
from kinema.interop.presets.ltx_vae import LTX2_VAE
from kinema.interop.presets.minimax import MINIMAX_H3
from kinema.interop.presets.mochi import MOCHI
from kinema.interop.presets.pixart import PIXART
from kinema.interop.presets.wan import WAN, WAN_VACE
from kinema.interop.presets.wan_vae import WAN_22_VAE, WAN_VAE

PRESETS: list[Preset] = [
    COGVIDEOX,
    COSMOS,
    HUNYUAN,
    HUNYUAN_15,
    KANDINSKY,
    LATTE,
    LTX,
    LTX2,
    MINIMAX_H3,
    MOCHI,
    PIXART,
    WAN,
    WAN_VACE,
    WAN_VAE,
    WAN_22_VAE,
    HUNYUAN_15_VAE,
    HUNYUAN_VAE,
    LTX2_VAE,
]
