"""A server over an engine that is not there, as a process of its own: `python -m tests.server.refusing FOLDER`, and its port on a line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import uvicorn

from server.app import create_app
from server.listener import bind
from server.logs import FORMAT, AboutRequests
from tests.fakes import FakeEngine, make_info
from tests.server.conftest import make_deployment


def main(folder: Path) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(AboutRequests())
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=FORMAT)  # as `cascade serve` writes it
    deployment = make_deployment(port=0, api_keys=("key",))
    app = create_app(FakeEngine(make_info(str(folder))), deployment)
    with bind(deployment.server) as listener:
        listener.listen()
        print(listener.getsockname()[1], flush=True)  # noqa: T201
        uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, access_log=False)).run([listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
