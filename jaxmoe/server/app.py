"""The routes: completions, chats, models, health, metrics and version. Errors of every kind leave in OpenAI's shape."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

import jaxmoe
from jaxmoe.server.errors import ApiError, shown
from jaxmoe.server.service import Service
from jaxmoe.server.wire import check_key, refuse

LOGGER = logging.getLogger("jaxmoe.server")


def build_app(service: Service, lifespan: Lifespan[Starlette] | None = None) -> ASGIApp:
    """The ASGI application.

    Args:
        service: what answers.
        lifespan: Starlette's; has the worker started and stopped.
    """
    created = int(time.time())

    def model() -> dict[str, object]:
        served = service.served
        return {"id": served.model, "object": "model", "created": created, "owned_by": "jaxmoe", "max_model_len": served.positions}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.served.model:
            raise ApiError(404, f"there is no model {shown(name)}; this server has {service.served.model!r}", param="model", code="model_not_found")
        return JSONResponse(model())

    async def health(request: Request) -> Response:
        worker = service.worker
        status = "draining" if service.draining else worker.status
        body = {"status": status, "requests": service.busy, "step_seconds": round(worker.step_seconds, 3)}
        return JSONResponse(body, status_code=503 if status in ("draining", "failed") else 200)

    async def metrics(request: Request) -> Response:
        await service.worker.refresh()
        return Response(service.metrics.page(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(request: Request) -> Response:
        return JSONResponse({"version": jaxmoe.__version__})

    routes: Sequence[BaseRoute] = [
        Route("/v1/completions", _Generate(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", _Generate(service, chat=True), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/version", version),
    ]
    paths = [route.path.partition("{")[0] for route in routes if isinstance(route, Route)]
    app = Starlette(routes=routes, exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _fault}, lifespan=lifespan)
    app.router.redirect_slashes = False
    return _Door(app, service, paths)


class _Generate:
    """An endpoint that answers with generated text; ASGI itself, since it has to see the client go."""

    def __init__(self, service: Service, chat: bool):
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._service.answer(scope, receive, send, self._chat)


class _Door:
    """What every request passes: the key, for /v1, and the count of answers."""

    def __init__(self, app: ASGIApp, service: Service, paths: Sequence[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1000})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]
        known = next((known for known in self._paths if path == known or (known.endswith("/") and path.startswith(known))), "other")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.http.labels(known, str(message["status"])).inc()
            await send(message)

        try:
            if path.startswith("/v1/"):
                check_key(scope, self._service.settings.api_keys)
        except ApiError as error:
            return await refuse(error, receive, counted)
        await self._app(scope, receive, counted)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path}", 405: f"{request.method} isn't allowed here"}.get(error.status_code, error.detail)
    response = JSONResponse(ApiError(error.status_code, what).body(), status_code=error.status_code, headers=error.headers)
    response.headers["connection"] = "close"  # a body may follow that nobody reads
    return response


async def _fault(request: Request, error: Exception) -> Response:
    LOGGER.error("a request failed through a fault of the server", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed on this request; its log says more", code="server_fault").body(), status_code=500)
