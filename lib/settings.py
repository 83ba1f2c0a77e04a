"""What all settings have in common: each component's are a small model beside it, with bounds on its fields."""

from typing import Annotated, Any, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lib.errors import SettingsError, objection

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Settings(BaseModel):
    """The settings of one component: frozen, without unknown names, and finite; one value is a list of one.

    Raises:
        SettingsError: a value is out of its bounds, or a name unknown; one line that begins with the setting's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(objection(error, type(self))) from error

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        """Take one value as a list of one, where a setting is a list: without_sources=trending."""
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) in (list, tuple)}
        return {
            name: [value] if name in lists and isinstance(value, str | dict) else value
            for name, value in values.items()
        }
