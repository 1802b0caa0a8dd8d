"""The HTTP side: paths, status codes, and errors that say why and nothing about the machine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tldist import __version__
from tldist.serve.answers import describe_package, read_query
from tldist.serve.batching import QueueFull
from tldist.serve.service import Service
from tldist.serve.uploads import Refused, read_uploads

_RETRY_SECONDS = "1"


def build_app(service: Service) -> ASGIApp:
    """The ASGI application of a service: ``POST /predict``; ``GET /healthz /readyz /info /metrics``."""
    endpoints = Endpoints(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    routes = [
        Route("/predict", endpoints.predict, methods=["POST"]),
        Route("/healthz", endpoints.live),
        Route("/readyz", endpoints.ready),
        Route("/info", endpoints.info),
        Route("/metrics", endpoints.metrics),
    ]
    handlers = {Refused: _refused, QueueFull: _busy, HTTPException: _http, Exception: _internal}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return _Counted(app, service, {route.path for route in routes})


class Endpoints:
    """The answers to each path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def predict(self, request: Request) -> Response:
        """Answer for the images of a request: 200; 422 where any of them cannot be decoded."""
        service, start = self._service, time.monotonic()
        if not service.ready:
            return _unavailable("not ready yet")
        wanted = read_query(request.query_params, service.config, service.recipe)
        received = False
        try:
            # The place is taken before the body is read, so that bodies in memory are bounded too.
            with service.batcher.places() as places:
                places.take(1)
                async with asyncio.timeout(service.recipe.timeout_s):
                    uploads = await read_uploads(request, service.recipe)
                    received = True
                    places.take(len(uploads) - 1)
                    predictions = await service.answer(places, uploads, wanted)
        except TimeoutError:
            limit = f"{service.recipe.timeout_s:g} s"
            if received:
                return _error(504, f"no answer within {limit}")
            return _error(408, f"the body did not come within {limit}", {"Connection": "close"})
        except ClientDisconnect:
            return _error(400, "the client has gone")
        finally:
            service.metrics.seconds.observe(time.monotonic() - start)
        bad = [f"image {at}: {found['error']}" for at, found in enumerate(predictions) if "error" in found]
        body = {"predictions": predictions, "package": service.config.identity}
        if bad:
            return JSONResponse({"error": "; ".join(bad)[:2000], **body}, 422)
        return JSONResponse(body)

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """The package is loaded, checked and warm."""
        return JSONResponse({"status": "ready"}) if self._service.ready else _unavailable("not ready")

    async def info(self, request: Request) -> Response:
        """What is served."""
        service = self._service
        about = describe_package(service.config, service.recipe)
        return JSONResponse({**about, "server": f"tldist {__version__}"})

    async def metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        text, content_type = self._service.metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})


class _Counted:
    """Counts requests by path and status, those that no route answers too."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count)


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status, headers=headers)


def _unavailable(reason: str) -> Response:
    # The body is not read, so the connection cannot go on.
    return _error(503, reason, {"Retry-After": _RETRY_SECONDS, "Connection": "close"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, error.reason, {"Connection": "close"} if error.close else None)


async def _busy(request: Request, error: Exception) -> Response:
    return _unavailable("too many images are waiting; try again later")


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _internal(request: Request, error: Exception) -> Response:
    return _error(500, "internal error; the server's log says more")
