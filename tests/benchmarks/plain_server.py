"""The peer of the load benchmark: a server as one writes it by hand, one process of uvicorn, torch and FAISS.

    python -m tests.benchmarks.plain_server --model MODEL --data DATA --port 8001

Each request is answered on its own: encode, search, remove seen items, reply. It has Afterclick's weights, histories in
memory as tensors, uvloop and orjson; no learning, pushes, versions or log.
"""

from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import orjson
import torch
import typer
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

from lib.data.dataset import read_events
from lib.data.histories import histories_of
from lib.model.batches import gap_buckets, value_buckets
from lib.model.folder import load_model


class Question(BaseModel):
    """A question: the user, and the number of items."""

    user_id: str
    k: int = 10


def application(model: Path, data: Path) -> FastAPI:
    """Return the whole server."""
    encoder, catalog, _ = load_model(model)
    encoder.eval().requires_grad_(False)
    config = encoder.config
    assert config.event_kinds is not None
    assert config.value_boundaries is not None
    histories = histories_of(read_events(data), catalog.row_of, config.event_kinds)
    codes = (
        histories.rows,
        histories.kinds,
        gap_buckets(histories.timestamps, histories.offsets[:-1], config.gap_buckets),
        value_buckets(histories.values, config.value_boundaries),
    )
    columns = [torch.from_numpy(column.astype(np.int64)) for column in codes]
    place_of = {user_id: place for place, user_id in enumerate(histories.user_ids)}
    seen = [set(histories.rows[a:b].tolist()) for a, b in zip(histories.offsets, histories.offsets[1:], strict=False)]
    with torch.inference_mode():
        vectors = encoder.item_vectors().numpy()
    index = faiss.IndexIDMap(faiss.IndexFlatIP(config.hidden_size))
    index.add_with_ids(vectors[1 : len(catalog) + 1], np.arange(1, len(catalog) + 1))
    app = FastAPI()

    @app.post("/v1/recommendations")
    async def recommend(question: Question) -> Response:
        place = place_of[question.user_id]
        stop = int(histories.offsets[place + 1])
        start = max(int(histories.offsets[place]), stop - config.max_length)
        rows, kinds, gaps, values = (column[None, start:stop] for column in columns)
        with torch.inference_mode():
            u = encoder.interests(kinds, gaps, values, torch.tensor([stop - start]), rows)
            query = encoder.queries(u).numpy()
        scores, found = index.search(query, question.k + len(seen[place]))
        pairs = zip(scores[0].tolist(), found[0].tolist(), strict=True)
        unseen = [(score, row) for score, row in pairs if row > 0 and row not in seen[place]][: question.k]
        items = [
            {"item_id": catalog.item_ids[row], "score": score, "title": catalog.titles.get(catalog.item_ids[row])}
            for score, row in unseen
        ]
        return Response(orjson.dumps({"items": items}), media_type="application/json")

    return app


def plain_server(
    model: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()],
    port: Annotated[int, typer.Option()],
    threads: Annotated[int, typer.Option(help="Of torch and FAISS.")] = 1,
) -> None:
    """Serve until the process is ended."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    uvicorn.run(application(model, data), host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    typer.run(plain_server)
