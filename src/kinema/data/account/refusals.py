"""What `data.rights` refuses of an index: a question for each distinct word, a number for each clip."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kinema.data.account.rights import RightsPolicy, first_few
from kinema.data.dataset.shards import DatasetIndex


def refused_rows(policy: RightsPolicy, index: DatasetIndex) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The reasons of `RightsPolicy.refusal`, in its order, each with the rows of a single data set that it refuses."""
    columns = index.columns
    for column, refused in (
        (columns.license, policy.refused_license),
        (columns.consent, policy.refused_consent),
        (columns.generated, policy.refused_generated),
        (columns.source, policy.refused_source),
    ):
        for code, name in enumerate(column.names):
            if reason := refused(name):
                yield reason, column.codes == code
    if policy.excluded_keys:
        numbers: dict[str | None, int] = {None: 0}
        answers = (numbers.setdefault(policy.refused_key(key), len(numbers)) for key in index.clip_keys())
        codes = np.fromiter(answers, np.int8, len(columns))
        for reason, number in numbers.items():
            if reason is not None:
                yield reason, codes == number


class Refusals:
    """Why each clip of an index, or of several joined ones, may not be used; most often None."""

    def __init__(self, policy: RightsPolicy | None, index: DatasetIndex) -> None:
        numbers: dict[str, int] = {}
        self.codes = np.zeros(len(index.entries), np.int16)
        """Of each clip, 0 or the number of its reason, counted from 1."""
        for first, part in index.members_by_first().items():
            codes = self.codes[first : first + len(part.entries)]
            for reason, rows in refused_rows(policy, part) if policy else ():
                codes[rows & (codes == 0)] = numbers.setdefault(reason, len(numbers) + 1)
        self.reasons: list[str | None] = [None, *numbers]

    def __getitem__(self, number: int) -> str | None:
        return self.reasons[self.codes[number]]


def change_of_rights(
    index: DatasetIndex, planned: NDArray[np.int32], before: RightsPolicy, now: RightsPolicy
) -> str | None:
    """What a policy that was changed after planning does to a plan's clips, given by number, as a line for people."""
    if before == now:
        return None
    refusals = Refusals(now, index)
    codes = refusals.codes[planned]
    found, firsts = np.unique(codes, return_index=True)
    reasons = []
    for code in found[np.argsort(firsts)].tolist():
        if code:
            rows = planned[codes == code]
            keys = [index.text("key", number) for number in rows[:6].tolist()]
            reasons.append(f"{refusals.reasons[code]} {len(rows)} ({first_few(keys)})")
    return (
        f"data.rights has changed since the plan was made: {int((codes > 0).sum())} of its {len(planned)} clips are no "
        f"longer read{': ' if reasons else ''}{'; '.join(reasons)}. They keep their places with weight 0, so every "
        "other clip comes when it would have come; clips that were refused then stay out of this run."
    )
