"""FastAPI as in its tutorial: one photo per request, decoded and predicted in a thread pool, without batches."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from benchmarks.baselines.shared import Network, answer, decoded, network, options


def create_app(run: Network, workers: int) -> FastAPI:
    app, pool = FastAPI(), ThreadPoolExecutor(workers)

    def predicted(photo: bytes) -> dict[str, Any]:
        return answer(run([decoded(photo)])[0])

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        photo = await request.body()
        return await asyncio.get_running_loop().run_in_executor(pool, predicted, photo)

    return app


if __name__ == "__main__":
    chosen = options()
    uvicorn.run(create_app(network(chosen.model), chosen.workers), port=chosen.port, access_log=False)
