"""The committed table is what the tests of today would write, but for the last digits."""

from tests.parity.table import COMMAND, PAGE, page, problems, read
from tests.parity.test_dit_presets import CASES, TOLERANCE
from tests.parity.test_vae_presets import CASES as VAE_CASES
from tests.parity.test_vae_presets import case_id


def test_the_page_in_the_docs_is_not_stale():
    rows = read()
    found = problems(rows, TOLERANCE)
    missing = {*CASES, *map(case_id, VAE_CASES)} - rows.keys()
    sizes = {name: list(case.released) for name, case in CASES.items()}
    other = [name for name, releases in sizes.items() if list(rows.get(name, {}).get("released", {})) != releases]
    stale = [*found, *(f"no row of {name}" for name in missing), *(f"sizes of {name}" for name in other)]
    assert stale == [], f"type {COMMAND}"
    assert PAGE.read_text() == page(rows), f"docs/parity.md is not docs/parity.json: type {COMMAND}"
