"""A sweep that does not find a missing rule proves nothing: each rule of membership is switched off in turn."""

from dataclasses import replace

import pytest

from meshnode.core.membership.rules import Rules
from meshnode.core.node.mediator import NodeRules
from sim.sweep import settings
from sim.trial import run

SEEDS = 300
"""So many short worlds may be needed at most; the test ends with the first that shows it."""


@pytest.mark.parametrize(
    ("rules", "found_by"),
    [
        (Rules(signatures=False), "forged"),
        (Rules(anti_entropy=False), "rosters differ"),
        (Rules(refutation=False), "rosters differ"),
    ],
    ids=["signatures", "anti-entropy", "refutation"],
)
def test_a_rule_that_is_switched_off_is_found(rules: Rules, found_by: str) -> None:
    worlds = settings(0, SEEDS, nodes=5, until=60.0)

    assert any(run(replace(world, rules=NodeRules(rules))).rule == found_by for world in worlds)
