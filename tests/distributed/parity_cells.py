"""One cell of the parity matrix: a step of the engine on several ranks against plain PyTorch on one process."""

from functools import cache
from itertools import groupby, product
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.deepspeed_config import TrafficConfig
from kinema.distributed.engine import Engine, Precision
from kinema.distributed.halo import SlabAxis
from kinema.distributed.mesh import Mesh, make_mesh
from kinema.distributed.sequence import Ulysses
from kinema.models.dit import DiT, DiTConfig, Extras, ModulationSource, TextEdge, TextEmbedding
from kinema.models.vae import CausalVAE, Convolution, VAEConfig
from kinema.training.context_parallel import ContextParallel

CHANNELS, TEXT = 2, 8
WORDS = 3
SIZE = {"width": 16, "depth": 2, "num_heads": 2, "rope_axes": [4, 2, 2], "mlp_ratio": 2.0, "rope_theta": 20.0}
DITS = {
    "DiT, cross-attention": {},
    "DiT, joint attention": {
        "text": TextEdge.joint,
        "modulation": ModulationSource.linear,
        "single_depth": 1,
        "text_embedding": TextEmbedding.refiner,
        "refiner_depth": 1,
    },
}
VAE = {"latent_channels": 4, "width": 4, "decoder_width": 4, "convolution": Convolution.alternating}
MODELS = (*DITS, "VAE")
SHAPES = {
    "DiT": {True: [(3, 4, 6), (1, 4, 4), (2, 6, 2)], False: [(2, 4, 6), (2, 4, 6)]},
    "VAE": {True: [(5, 2, 2), (1, 3, 2)], False: [(3, 2, 2), (3, 2, 2)]},
}
"""Latent frames, rows and columns of a pack's clips: packed, and uniform; not what a number of ranks divides."""
CHECKPOINTING = ("none", "selective", "full")


class Cell(NamedTuple):
    """What is varied."""

    model: str
    zero_stage: int
    sequence_degree: int
    accumulation: int
    checkpointing: str
    packed: bool


class Result(NamedTuple):
    """Largest differences from the reference: of the loss and the norm relative, of gradients by tensor."""

    loss: float
    norm: float
    gradient: float


def all_cells() -> list[Cell]:
    """The whole matrix."""
    return [Cell(*values) for values in product(MODELS, range(4), (1, 2, 4), (1, 2, 4), CHECKPOINTING, (True, False))]


def covering_cells() -> list[Cell]:
    """Few cells that hold every pair of values of two dimensions but some: three Latin squares."""
    found = []
    for stage, model in product(range(4), range(3)):
        degree, count, kind = (stage + model) % 3, (stage + 2 * model) % 3, (2 * stage + model) % 3
        found.append(
            Cell(
                MODELS[model], stage, (1, 2, 4)[degree], (1, 2, 4)[count], CHECKPOINTING[kind], (stage + model) % 2 == 0
            )
        )
    return found


@cache
def initial(name: str) -> dict[str, Tensor]:
    """Weights: random in every parameter, since zero gates would hide what lies behind them."""
    torch.manual_seed(0)
    model = built(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if name in DITS else max(parameter[0].numel(), 1) ** -0.5)
    return {key: value.clone() for key, value in model.state_dict().items()}


def built(name: str) -> DiT | CausalVAE:
    return CausalVAE(VAEConfig(**VAE)) if name == "VAE" else DiT(DiTConfig(**SIZE, **DITS[name]), CHANNELS, TEXT)


def lane_loss(model, name: str, lane: int, packed: bool, parallel: ContextParallel) -> Tensor:
    """The sum of the clips' losses, as a rank of a sequence group computes it: all of them the same."""
    generator = torch.Generator().manual_seed(lane)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = SHAPES[name[:3]][packed]
    if name == "VAE":
        losses = []
        for shape in dict.fromkeys(shapes):
            pixels = (1 + (shape[0] - 1) * 4, shape[1] * 8, shape[2] * 8)
            video, noise = draw(shapes.count(shape), 3, *pixels).tanh(), draw(shapes.count(shape), 4, *shape)
            reconstruction, posterior = parallel.reconstruct(model, video, noise)
            losses.append((reconstruction - video).square().mean() + 0.1 * posterior.mean.square().mean())
        return torch.stack(losses).sum()
    latents = [draw(CHANNELS, *shape) for shape in shapes]
    text, times = [draw(WORDS + clip, TEXT) for clip in range(len(shapes))], torch.linspace(0.2, 0.8, len(shapes))
    found = model(latents, times, text, Extras())
    return torch.stack([(x - y).square().mean() for x, y in zip(found, latents, strict=True)]).sum()


@cache
def lane_reference(name: str, packed: bool, lane: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a lane, of one process in float32."""
    model, alone = built(name), ContextParallel(None, (4, 8), SlabAxis.time)
    model.load_state_dict(initial(name))
    loss = lane_loss(model, name, lane, packed, alone)
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return float(loss.detach()), dict(zip(dict(model.named_parameters()), found, strict=True))


def reference(name: str, packed: bool, lanes: int) -> tuple[float, dict[str, Tensor]]:
    """Those of their mean, added up in float64."""
    losses, gradients = zip(*(lane_reference(name, packed, lane) for lane in range(lanes)), strict=True)
    return sum(losses) / lanes, {key: sum(one[key].double() for one in gradients) / lanes for key in gradients[0]}


@cache
def mesh_of(degree: int) -> Mesh:
    return make_mesh(degree)


def built_engine(cell: Cell) -> tuple[Engine, ContextParallel]:
    model, mesh = built(cell.model), mesh_of(cell.sequence_degree)
    model.load_state_dict(initial(cell.model))
    parallel = ContextParallel(mesh.sequence_group if cell.model == "VAE" else None, (4, 8), SlabAxis.time)
    if isinstance(model, DiT) and mesh.sequence_group is not None:
        model.share_tokens(Ulysses(mesh))
    engine = Engine(
        model, torch.optim.AdamW(model.parameters(), weight_decay=0.0), zero_stage=cell.zero_stage,
        precision=Precision.float32, accumulation=cell.accumulation, gradient_clipping=1e6,
        traffic=TrafficConfig(bucket_elements=2000, resident_elements=100),  # several messages, cut weights
        blocks=model.all_blocks(),
    )  # fmt: skip
    return engine, parallel


def run_cell(cell: Cell, engine: Engine, parallel: ContextParallel) -> Result | None:
    """One step of all ranks, which moves no weight; the gradient is read from Adam's first moment, a tenth of it.

    The main rank compares.
    """
    for block in engine.module.all_blocks():
        vars(block).pop("forward", None)  # of the cell before
    keep_less(engine.module.all_blocks(), ActivationCheckpointing(cell.checkpointing))
    for moment in engine.state("exp_avg"):
        moment.zero_()
    mesh = mesh_of(cell.sequence_degree)
    lanes, total = mesh.data_size * cell.accumulation, torch.zeros(())
    for lane in range(mesh.data_rank * cell.accumulation, (mesh.data_rank + 1) * cell.accumulation):
        loss = lane_loss(engine, cell.model, lane, cell.packed, parallel) / lanes
        total += loss.detach() if mesh.counts else 0.0
        engine.backward(loss)
        engine.step(0.0)
    dist.all_reduce(total)
    found = {name: value.double() / 0.1 for name, value in engine.gather_state("exp_avg")}
    if dist.get_rank() > 0:
        return None
    expected_loss, expected = reference(cell.model, cell.packed, lanes)
    norm = float(torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt())
    floor = 1e-3 * max(float(g.abs().max()) for g in expected.values())
    differences = [
        float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), floor)
        for name, gradient in expected.items()
    ]
    return Result(abs(float(total) / expected_loss - 1), abs(engine.grad_norm() / norm - 1), max(differences))


def run_cells(cells: list[Cell]) -> list[Result | None]:
    """On every rank. Cells that differ in what is fed and kept alone share an engine."""
    found = []
    for _, members in groupby(cells, key=lambda cell: cell._replace(packed=True, checkpointing="none")):
        group = list(members)
        made = built_engine(group[0])
        found += [run_cell(cell, *made) for cell in group]
    return found
