"""What a bad body of PUT /v1/items is answered: one line that names the field and the remedy."""

from typing import Any, cast

import orjson
import pytest
from fastapi.testclient import TestClient

from serving.http import http_application

JSON = "application/json"
NO_OBJECT = "body: a JSON object is required, with the header content-type: application/json"


@pytest.mark.parametrize(
    ("body", "content_type", "detail"),
    [
        ({"items": []}, "application/x-www-form-urlencoded", NO_OBJECT),  # as curl sends it without the header
        ([], JSON, NO_OBJECT),
        (None, JSON, NO_OBJECT),
        ({"items": [{"item_id": "a", "tags": [1]}]}, JSON, "items.0.tags: [1] is no attribute; send a text, a number"),
        ({"items": [{"item_id": "a", "size": {"eu": 4}}]}, JSON, "items.0.size: {'eu': 4} is no attribute; send a"),
        ({"items": [{"item_id": "a", "tags": [None]}]}, JSON, "items.0.tags: [None] is no attribute; send a text"),
    ],
)
def test_a_bad_body_is_answered_with_the_field_and_the_remedy(body: Any, content_type: str, detail: str) -> None:
    client = TestClient(cast(Any, http_application(cast(Any, None))))  # no replica: it is not asked
    answer = client.put("/v1/items", content=orjson.dumps(body), headers={"content-type": content_type})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(detail)
