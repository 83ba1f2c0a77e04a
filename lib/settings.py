"""What all settings have in common: each component's are a small model beside it, with bounds on its fields."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.errors import SettingsError, objection

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Settings(BaseModel):
    """The settings of one component: frozen, without unknown names, and finite.

    Raises:
        SettingsError: a value is out of its bounds, or a name unknown; one line that begins with the setting's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(objection(error, type(self))) from error
