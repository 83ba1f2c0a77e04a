"""Bodies of HTTP requests and answers: pydantic models, which are also their documentation under /docs.

The status has its own (serving/status.py).
"""

from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lib.data.attribute_kinds import kind_of
from lib.data.events import EVENT_FIELDS, EVENT_KINDS, MAX_ID_LENGTH, checked_id

LARGEST_K = 1000
LARGEST_EVENT_BATCH = 1000
LARGEST_ITEM_BATCH = 1000
LARGEST_BODY = 16 * 2**20  # bytes

# ids in bodies and in paths obey the rules that those of events do
ID = Field(min_length=1, max_length=MAX_ID_LENGTH)
UserId = Annotated[str, ID, AfterValidator(partial(checked_id, "user_id"))]
ItemId = Annotated[str, ID, AfterValidator(partial(checked_id, "item_id"))]


class HistoryEvent(BaseModel):
    """One past event of a history that comes with the request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    item_id: str
    event: str = "click"
    value: float | None = None
    timestamp: int | None = Field(default=None, description="milliseconds since 1970, UTC; now if absent")


class RecommendationRequest(BaseModel):
    """Who asks: a user id, whose history the service knows, or a history."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: UserId | None = None
    history: list[HistoryEvent] | None = Field(default=None, max_length=10_000)
    k: int = Field(default=10, ge=1, le=LARGEST_K, description="number of items")
    filter: dict[str, Any] | None = Field(
        default=None,
        description='attribute conditions, e.g. {"genres": "Comedy", "price": {"max": 20}}, and allow or deny lists; '
        "at most 50 conditions with 1,000 values in all, and 10,000 ids in each list",
    )
    exclude_seen: bool | None = Field(
        default=None, description="leave out what the person has seen; default: unless people come back to items here"
    )
    explain: bool = False

    @model_validator(mode="after")
    def one_of_user_and_history(self) -> "RecommendationRequest":
        """Refuse two sources of the history, and none."""
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or history")
        return self


class RecommendedItem(BaseModel):
    """One item of an answer."""

    item_id: str
    score: float
    title: str | None = None
    reason: str | None = Field(
        default=None,
        description='"popular" for who has no history; with explain, what raised its score most, such as "because you '
        'bought Floor Lamp (60%); trending now (12%)"',
    )
    propensity: float | None = Field(
        default=None, description="with exploration: the probability of this item here, given those above it"
    )


class RecommendationResponse(BaseModel):
    """An answer, all of it made by one version."""

    request_id: str
    model_version: int
    arm: str | None = Field(
        default=None,
        description="of two models side by side: live, challenger, or shadow (answered by the live one)",
    )
    notes: list[str] | None = Field(
        default=None,
        description="what the question may have been meant otherwise: attributes of its filter that no item has",
    )
    items: list[RecommendedItem]


def checked_attribute(value: Any) -> Any:
    """Refuse what is no attribute in one line, where the union below would list what each of its kinds objects to."""
    kind_of(value)
    return value


Attribute = Annotated[str | bool | int | float | list[str] | None, BeforeValidator(checked_attribute)]


class ItemDescription(BaseModel):
    """An item: its id, and whatever attributes it has."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, Attribute]  # pyright: ignore[reportIncompatibleVariableOverride]

    item_id: ItemId


class ItemsRequest(BaseModel):
    """Items that are new, or whose attributes changed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    items: list[ItemDescription] = Field(min_length=1, max_length=LARGEST_ITEM_BATCH)


class RollbackRequest(BaseModel):
    """The version whose weights are wanted back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1)


JSON_TYPES = {str: "string", int: "integer", float: "number"}
EVENT_NOTES: dict[str, dict[str, Any]] = {
    "event": {"enum": list(EVENT_KINDS)},
    "value": {"nullable": True},
    "timestamp": {"description": "milliseconds since 1970, UTC"},
    "event_id": {
        "description": "makes a repeated request harmless; without it the timestamp does; without both an event may "
        "count twice when the replica that took it dies before it answers"
    },
    "request_id": {"description": "of the answer that was shown"},
}
EVENTS_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["events"],
                    "additionalProperties": False,
                    "properties": {
                        "events": {
                            "type": "array",
                            "maxItems": LARGEST_EVENT_BATCH,
                            "items": {
                                "type": "object",
                                "required": ["user_id", "item_id", "event"],
                                "additionalProperties": False,
                                "properties": {
                                    field.name: {"type": JSON_TYPES[field.kind]} | EVENT_NOTES.get(field.name, {})
                                    for field in EVENT_FIELDS
                                },
                            },
                        }
                    },
                }
            }
        },
    }
}
