"""Key maps: every tensor is named once, and the way back gives the same bits."""

import pytest
import torch

from kinema.interop.keymap import Chain, Fused, KeyMap, PermutedRows, Reshaped, Rule

TABLE = KeyMap(
    [
        Rule("patch.weight", "patch_embedding.weight", Reshaped((6, -1, 1, 2, 2), (6, -1))),
        Rule("blocks.{i}.norm.{p}", "layers.{i}.norm.{p}"),
        Rule("blocks.{i}.qkv.{p}", ("layers.{i}.q.{p}", "layers.{i}.k.{p}", "layers.{i}.v.{p}"), Fused((6, 4, 4))),
        Rule("out.weight", "head.weight", PermutedRows((1, 2, 3, 5), (3, 0, 1, 2))),
    ]
)


def theirs():
    generator = torch.Generator().manual_seed(0)
    shapes = {"patch.weight": (6, 5, 1, 2, 2), "out.weight": (30, 7)}
    for i in (0, 11):
        shapes |= {f"blocks.{i}.norm.weight": (3,), f"blocks.{i}.qkv.weight": (14, 3), f"blocks.{i}.qkv.bias": (14,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_there_and_back_is_bit_equal():
    before = theirs()
    ours = TABLE.to_ours(before)
    back = TABLE.to_theirs(ours)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)
    assert torch.equal(ours["layers.11.k.weight"], before["blocks.11.qkv.weight"][6:10])
    assert torch.equal(ours["patch_embedding.weight"], before["patch.weight"].flatten(1))


def test_permuted_rows_are_an_einops_of_the_rows():
    rows = torch.arange(30.0)[:, None].expand(30, 2)
    moved = PermutedRows((1, 2, 3, 5), (3, 0, 1, 2)).to_ours([rows])[0]
    assert moved[:, 0].tolist() == [c + 5 * w + 15 * h for c in range(5) for h in range(2) for w in range(3)]


def test_a_chain_runs_backwards_on_the_way_back():
    chain = Chain((PermutedRows((2, 3), (1, 0)), Reshaped((6, 4), (6, 2, 2))))
    tensor = torch.randn(6, 4)
    assert torch.equal(chain.to_theirs(chain.to_ours([tensor]))[0], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"blocks.0.extra": torch.zeros(2)}), r"blocks\.0\.extra \(2,\) is named by no rule"),
        (lambda t: t.update({"a.patch.weight": torch.zeros(2)}), r"a\.patch\.weight"),
    ],
)
def test_a_key_that_no_rule_names_is_listed(change, message):
    tensors = theirs()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        TABLE.to_ours(tensors)


def test_a_tensor_missing_from_a_group_is_named():
    ours = TABLE.to_ours(theirs())
    del ours["layers.11.k.weight"]
    with pytest.raises(ValueError, match=r"layers\.11\.k\.weight missing beside layers\.11\.q\.weight"):
        TABLE.to_theirs(ours)
