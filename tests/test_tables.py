"""Tables of results: every row keeps its own name."""

from typing import Any

import pytest

from marval.tables import pair_table, paired, result_table


def results(*specs: str) -> dict[str, Any]:
    """Of an evaluation with these rewards, whose means are 0.5, 1.5, ..."""
    rewards = {spec: {"mean": 0.5 + i, "interval95": 0.1} for i, spec in enumerate(specs)}
    timing = {"seconds_per_image": 0.002, "batch": 4}
    return {"fid": 3.0, "precision": 0.25, "rewards": rewards, "timing": timing, "protocol": {"seed": 0}}


@pytest.mark.parametrize("name", ["precision", "FID", "ms per image"])
def test_a_reward_named_like_another_row_keeps_its_whole_name(name: str):
    found = results(f"a.py:{name}", "a.py:ink")
    lines = [line.split() for line in result_table(found, "model").splitlines()]
    assert ["precision", "0.2500"] in [line[:2] for line in lines]
    assert ["FID", "3.0000"] in [line[:2] for line in lines]
    assert [*f"a.py:{name}".split(), "0.5000"] in [line[: 1 + len(name.split())] for line in lines]
    assert ["ink", "1.5000"] in [line[:2] for line in lines]
    differences = {spec: {"mean": 0.125, "interval95": 0.1} for spec in found["rewards"]}
    table = pair_table(paired(found, found, differences), "after", "before")
    rows = [line.split() for line in table.splitlines()]
    assert ["precision", "0.2500", "0.2500", "+0.0000"] in rows
    assert any(row[: len(name.split())] == f"a.py:{name}".split() and "+0.1250" in row for row in rows)
