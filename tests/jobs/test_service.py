"""What cannot be served is refused before Ray is started."""

from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.local import free_port
from jobs.service import check_service
from lib.data.catalog import Catalog
from lib.data.dataset import write_dataset
from lib.data.events import EVENT_SCHEMA
from lib.errors import InputError
from lib.model.folder import Manifest, save_model, write_manifest
from serving.app import ServeArguments
from tests.helpers.tiny import NOW, item_ids, tiny_encoder


@pytest.mark.parametrize("kind", ["rating", "click"])
def test_a_dataset_of_another_rating_scale_is_refused(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path / "model", tiny_encoder(rating_scale="0-100"), Catalog(item_ids(24)), Manifest())
    write_manifest(tmp_path / "model", Manifest())
    event = {"user_id": "ann", "item_id": "i1", "event": kind, "value": 4.0, "timestamp": NOW}
    write_dataset(tmp_path / "stars", pa.Table.from_pylist([event], EVENT_SCHEMA), None)
    arguments = ServeArguments(model=str(tmp_path / "model"), data=str(tmp_path / "stars"))
    refused = pytest.raises(InputError, match=r"^data: the ratings of .*stars are on the scale 1-5, .* on 0-100;")
    with refused if kind == "rating" else nullcontext():  # other events have no scale
        check_service(arguments, free_port())
