"""`python -m benchmarks.scraping URL SECONDS`: asks for /metrics so often until its standard input ends, and prints what each answer took.

A process of its own: a program that reads 64 streams at once has no time to time anything.
"""

from __future__ import annotations

import http.client
import json
import selectors
import sys
import time
from urllib.parse import urlsplit


def main(url: str, interval: str) -> None:
    """Print an empty line when it begins, and then the milliseconds of each scrape, and the bytes of the last one, as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    _scrape(connection)  # connects
    print(flush=True)
    milliseconds, size = list[float](), 0
    with selectors.DefaultSelector() as input_ended:
        input_ended.register(sys.stdin, selectors.EVENT_READ)
        while not milliseconds or not input_ended.select(float(interval)):
            began = time.perf_counter()
            size = _scrape(connection)
            milliseconds.append(1000 * (time.perf_counter() - began))
    print(json.dumps({"milliseconds": milliseconds, "bytes": size}))


def _scrape(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    size = len(response.read())
    if response.status != 200:
        sys.exit(f"/metrics answered {response.status}")
    return size


if __name__ == "__main__":
    main(*sys.argv[1:])
