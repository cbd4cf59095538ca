"""Whether the server in this container is ready, for its health check: exit code 0, or 1 and why. Reads the variables that started it.

A port or a certificate that stands in the deployment file alone is not known here: set CASCADE_PORT and CASCADE_TLS_CERTIFICATE.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request


def main() -> int:
    scheme = "https" if os.environ.get("CASCADE_TLS_CERTIFICATE") else "http"
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE  # the certificate is for another name than this address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=anyone))
    try:
        opener.open(f"{scheme}://127.0.0.1:{os.environ.get('CASCADE_PORT') or 8000}/ready", timeout=4).close()
    except urllib.error.HTTPError as error:
        sys.stderr.write(f"{error.code}: {error.read(1000).decode(errors='replace')}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
