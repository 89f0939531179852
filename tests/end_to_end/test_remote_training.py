"""Training from a real nginx with trouble in between: the losses of training from disk."""

import json

import pytest

from tests.end_to_end.commands import dit_command, losses, records
from tests.end_to_end.runs import run
from tests.servers import faulty_proxy, nginx

QUICK = ["data.storage.retries=6", "data.storage.backoff_seconds=0.02", "data.storage.timeout_seconds=1"]
TROUBLE = {"reset": 0.1, "stall": 0.05, "short": 0.1, "503": 0.1, "429": 0.05}


@pytest.mark.parametrize("steps", [4, pytest.param(150, marks=pytest.mark.soak)])
def test_a_run_over_a_bad_network_has_the_losses_of_one_from_disk(folder, tmp_path, steps):
    run(*dit_command(folder, f"disk-{steps}", steps))
    with nginx(folder, tmp_path / "nginx") as port, faulty_proxy(port, TROUBLE, seed=3) as proxy:
        address = f"http://user:geheim@127.0.0.1:{proxy.port}/toy?key=geheim"
        remote = [f"data.path='{address}'", f"data.cache_folder={tmp_path}/cache", *QUICK]
        answer = run(*dit_command(folder, f"net-{steps}", steps, *remote, "data.storage.cache_gib=0"), timeout=600)
    assert losses(folder, f"net-{steps}") == losses(folder, f"disk-{steps}")
    assert len(losses(folder, f"net-{steps}")) == steps
    assert sum(record["storage_retries"] for record in records(folder, f"net-{steps}", "train").values()) > 0
    assert len(+proxy.injected) == 6, proxy.injected
    disk, net = (folder / "runs" / f"{name}-{steps}" for name in ("disk", "net"))
    assert json.loads((net / "ledger.json").read_text()) == json.loads((disk / "ledger.json").read_text())
    written = [path for path in net.rglob("*") if path.is_file()]
    assert not [path for path in written if b"geheim" in path.read_bytes()]
    assert "geheim" not in answer.stdout + answer.stderr
