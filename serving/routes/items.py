"""The catalog, changed while it is live."""

from fastapi import APIRouter, HTTPException, Response

from serving.routes.dependencies import Replica, json_response
from serving.schemas import ItemId, ItemsRequest

router = APIRouter()


@router.put("/v1/items")
async def put_items(replica: Replica, request: ItemsRequest) -> Response:
    """Add items, or change the attributes of known ones; 200 means that it is durable.

    Filters and titles know them from the next answer on; a new item can be recommended within a second. An attribute is
    of one kind for all items: text, true or false, numbers, or lists of texts. What is of another kind is refused with
    422, and nothing of the request is taken.
    """
    items = {item.item_id: item.__pydantic_extra__ for item in request.items}
    served = await replica.models.served_kinds({name for attributes in items.values() for name in attributes})
    await replica.aggregators.change_items(list(items.items()), served)
    return json_response({"accepted": len(items)})


@router.delete("/v1/items/{item_id:id}")
async def delete_item(replica: Replica, item_id: ItemId) -> Response:
    """Take an item out of every answer from the next one on, for good, or until it is put again."""
    models = await replica.current_models()
    if not models.has_item(item_id):
        raise HTTPException(404, f"item_id: the catalog has no item {item_id!r}")
    await replica.aggregators.change_items([(item_id, None)])
    return json_response({"item_id": item_id, "deleted": True})
