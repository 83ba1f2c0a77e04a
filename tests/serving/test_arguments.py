"""What the application is built from: every setting has its bounds, and reaches the part that it is for."""

import pytest

from lib.errors import SettingsError
from serving.aggregator import Trigger
from serving.app import ServeArguments


def test_trigger_and_cleaning_rules_reach_the_aggregators():
    written = {"model": "models/shop", "trigger": {"events": 8, "milliseconds": 50}, "cleaning": {"flood_events": 7}}
    aggregator = ServeArguments.model_validate(written).aggregator  # as Serve reads cluster/serve.yaml
    assert aggregator.trigger == Trigger(events=8, milliseconds=50)
    assert aggregator.cleaning.flood_events == 7
    assert ServeArguments(model="models/shop").aggregator.trigger == Trigger(events=64, milliseconds=200)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trigger": {"events": 0}}, "trigger.events: input should be greater than or equal to 1, got 0"),
        ({"trigger": {"event": 8}}, "trigger.event: no such setting, did you mean events?"),
        ({"replica": {"threads": 0}}, "replica.threads: input should be greater than or equal to 1"),
        ({"replica": {"longest_wait": 0}}, "replica.longest_wait: input should be greater than 0"),
        ({"autoscaling": {"target_ongoing_requests": 0}}, "autoscaling.target_ongoing_requests: input should be"),
        ({"ranking": {"boost": [{"filter": {"a": 1}, "weight": -1}]}}, "ranking.boost.0.weight: input should be"),
        ({"replicas": 0}, "replicas: input should be greater than or equal to 1"),
        ({"replicaz": 3}, "replicaz: no such setting, did you mean replica?"),
    ],
)
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(SettingsError) as raised:
        ServeArguments(model="models/shop", **wrong)
    assert str(raised.value).startswith(message)
