"""Layouts that the tables of autoencoders need, and constants that configs hold."""

import pytest
import torch

from kinema.interop.keymap import Along, Fused, Inverse, KeyMap, PermutedRows, Rule, Unsqueezed


def test_every_layout_goes_there_and_back():
    columns = torch.arange(24.0).view(2, 12)
    moved = Along(1, PermutedRows((3, 2, 2), (2, 1, 0))).to_ours([columns])[0]
    assert moved[0].tolist() == [4 * c + 2 * w + h for h in range(2) for w in range(2) for c in range(3)]
    assert torch.equal(Along(1, PermutedRows((3, 2, 2), (2, 1, 0))).to_theirs([moved])[0], columns)
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    (whole,) = Inverse(Fused((2, 4))).to_ours(parts)
    assert torch.equal(whole, torch.cat(parts))
    assert all(map(torch.equal, Inverse(Fused((2, 4))).to_theirs([whole]), parts))
    kernel = torch.randn(2, 3, 3, 3)
    (image,) = Unsqueezed(2).to_ours([kernel])
    assert image.shape == (2, 3, 1, 3, 3)
    assert torch.equal(Unsqueezed(2).to_theirs([image])[0], kernel)


def test_constants_come_from_the_config_and_must_agree_on_the_way_out():
    table = KeyMap([Rule("a.{p}", "b.{p}")], {"mean": torch.tensor([1.0, 2.0])})
    ours = table.to_ours({"a.weight": torch.ones(2)})
    assert ours.keys() == {"b.weight", "mean"}
    assert table.to_theirs(ours).keys() == {"a.weight"}
    with pytest.raises(ValueError, match="mean has other numbers than the config"):
        table.to_theirs(ours | {"mean": torch.tensor([1.0, 3.0])})
    with pytest.raises(ValueError, match="mean is missing or has another shape"):
        table.to_theirs({"b.weight": torch.ones(2)})
