"""``tldist serve``: listen, load, answer, and when told to stop, finish what was begun."""

from __future__ import annotations

import math
import socket
from types import FrameType

import uvicorn

from tldist.errors import MachineError
from tldist.progress import say
from tldist.runs import Outcome
from tldist.runtime.package import read_package
from tldist.serve.app import build_app
from tldist.serve.recipe import ServeRecipe
from tldist.serve.service import Service


def run(recipe: ServeRecipe) -> Outcome:
    """Serve a package until SIGTERM or SIGINT; what was begun is finished first.

    Raises:
        TldistError: the package cannot be loaded, or the address cannot be listened on.
    """
    config = read_package(recipe.package, verify=False)  # hashes are checked when it is loaded
    service = Service(recipe, config)
    listener = listen(recipe.host, recipe.port)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {recipe.package} ({config.profile_name}, {config.identity[:12]}) at http://{shown}:{port}")
    _Server(service).run(sockets=[listener])
    if service.failure:
        raise service.failure
    return Outcome("serve", values={"package": config.identity}, text="stopped: nothing was left waiting")


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        MachineError: the address is not this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise MachineError(f"host={host}: no address of this machine: {error.strerror or error}.") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise MachineError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another port= "
            f"(0: a free one) or host=."
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn that stops when the package cannot be loaded, and that ends well after a signal.

    uvicorn drains on SIGTERM and then raises the signal again, which would end the process with its number
    instead of 0; for a server, being stopped is how it ends.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        recipe = service.recipe
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http="httptools",
                ws="none",
                lifespan="on",
                log_level="info" if recipe.access_log else "warning",
                access_log=recipe.access_log,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(recipe.timeout_s) + 1,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal: drain; on a second one: leave at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._service.failure:
            self.should_exit = True
        return await super().on_tick(counter)
