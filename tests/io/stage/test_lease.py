from meshnode.io.stage.lease import StageLease, awake_and_asleep


class Clock:
    now = 100.0

    def read(self) -> float:
        return self.now


def test_a_stage_without_a_lease_serves_for_ever() -> None:
    assert not StageLease(lambda: 1e18).over


def test_a_lease_ends_at_its_time_and_a_later_one_begins_anew() -> None:
    clock = Clock()
    lease = StageLease(clock.read)
    lease.renew(15_000)
    clock.now = 114.999
    assert not lease.over
    clock.now = 115.0
    assert lease.over
    lease.renew(5_000)
    assert not lease.over


def test_the_clock_never_goes_back() -> None:
    one = awake_and_asleep()
    assert awake_and_asleep() >= one
