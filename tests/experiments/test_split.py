"""Who is in which arm of an experiment stays so, also after a restart with another release."""

import pytest

from lib.experiments.split import place_of

USERS = ("alice", "bob", "ünï", "日本", "")


@pytest.mark.parametrize(
    ("salt", "places"),
    [
        (
            "a challenger",
            [0.25281886235851436, 0.10679281073050095, 0.9318155559949197, 0.6777472412630994, 0.2328880161778022],
        ),
        (
            "x" * 70,
            [0.4811007967982335, 0.10722180944583626, 0.9439716588301117, 0.7117361775974639, 0.5010438279732926],
        ),
    ],
)
def test_a_user_has_the_same_place_for_good(salt, places):
    assert [place_of(user, salt) for user in USERS] == places
