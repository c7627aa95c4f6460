"""A sweep that does not find a missing rule proves nothing: each rule of membership is switched off in turn."""

from dataclasses import replace

import pytest

from meshnode.core.coordination.rules import CoordinationRules
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


@pytest.mark.parametrize(
    ("rule", "found_by", "aim"),
    [
        ("persisted_grant", "broken word", ""),
        ("unanimity", "hasty", ""),
        ("ledger", "overbooked", "rush"),
        ("fence", "two drivers", ""),
        ("signed_claim", "forged claim", ""),
        ("holder_evidence", "usurped", "rival"),
    ],
)
def test_a_rule_of_coordination_that_is_switched_off_is_found(rule: str, found_by: str, aim: str) -> None:
    rules = NodeRules(coordination=CoordinationRules(**{rule: False}))
    worlds = [replace(world, rules=rules, aim=aim) for world in settings(0, SEEDS, nodes=5, until=30.0)]

    assert any(run(world).rule == found_by for world in worlds)


@pytest.mark.parametrize("aim", ["rush", "rival"])
def test_the_schedules_that_are_aimed_at_a_rule_break_none_while_it_holds(aim: str) -> None:
    worlds = [replace(world, aim=aim) for world in settings(0, 30, nodes=5, until=30.0)]

    assert [outcome.rule for world in worlds if not (outcome := run(world)).good] == []
