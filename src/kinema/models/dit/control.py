"""A second tower that reads given channels and steers the video from the side."""

from torch import Tensor, nn

from kinema.models.dit.blocks import control_blocks
from kinema.models.dit.conditioning import Condition
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.layers import Linear
from kinema.models.dit.segments import Segments, Tokens


class ControlTower(nn.Module):
    """Blocks like the model's own over given channels; what each makes of them is a hint for one of the model's.

    Zhang et al. 2023 (ControlNet), section 3.1, and Jiang et al. 2025 (VACE), whose tower sees the noisy video once,
    before its first block. The hints start at zero: a model with a new tower is the model without.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.layers = config.control_layers
        pt, ph, pw = config.patch_size
        self.patch_embedding = Linear(config.control_channels * pt * ph * pw, config.width)
        self.enter = Linear(config.width, config.width)
        self.blocks = nn.ModuleList(control_blocks(config))
        self.hints = nn.ModuleList(Linear(config.width, config.width) for _ in self.layers)

    def forward(self, patches: Tensor, tokens: Tokens, segments: Segments, condition: Condition) -> list[Tensor]:
        """patches (N, control_channels * pt * ph * pw), tokens before the model's blocks -> a hint (N, D) a layer

        A list, since ZeRO-3 walks through what modules return and takes the keys of dictionaries for names.
        """
        control = self.enter(self.patch_embedding(patches)) + tokens["video"]
        tokens, hints = {**tokens, "video": control}, []
        for block, hint in zip(self.blocks, self.hints, strict=True):
            tokens = block(tokens, segments, condition)
            hints.append(hint(tokens["video"]))
        return hints
