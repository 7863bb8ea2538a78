# The server, on a CPU. Build and run:
#
#   docker build -t qpeft .
#   docker run --rm --init -p 127.0.0.1:8080:8080 qpeft
#   docker run --rm --init -p 127.0.0.1:8080:8080 -v qpeft-models:/models qpeft serve --host 0.0.0.0 --model Qwen/Qwen3-0.6B
#
# pip's usual index has torch for Linux with CUDA, several GB of it. A smaller image comes from an index with builds for CPUs
# (torch's own installation page names one), given as an argument; only torch is taken from there:
#
#   docker build --build-arg TORCH_INDEX_URL=… -t qpeft .
#
# PIP_INDEX_URL, another argument, is a mirror for everything else.

FROM python:3.11-slim AS build
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/qpeft
WORKDIR /src
COPY constraints.txt ./
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        /opt/qpeft/bin/pip install --constraint constraints.txt --index-url "$TORCH_INDEX_URL" --no-deps torch; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/qpeft/bin/pip install --constraint constraints.txt '.[server,lora]'

FROM python:3.11-slim
COPY --from=build /opt/qpeft /opt/qpeft
# Of batches in ever other sizes, jemalloc keeps less that is free than the C library's own allocator (docs/serving.md).
RUN apt-get update && apt-get install --yes --no-install-recommends libjemalloc2 && rm -rf /var/lib/apt/lists/*
ENV LD_PRELOAD=libjemalloc.so.2
RUN useradd --uid 10001 --create-home qpeft && install --directory --owner=qpeft --group=qpeft /models
ENV PATH=/opt/qpeft/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/qpeft
VOLUME /models
EXPOSE 8080
# http.client knows of no proxies.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s CMD ["python", "-c", "import http.client as http; server = http.HTTPConnection('127.0.0.1', 8080, timeout=4); server.request('GET', '/health'); raise SystemExit(server.getresponse().status != 200)"]
# No shell in between, so that SIGTERM reaches the server, which then answers what it has accepted (up to 30 s).
ENTRYPOINT ["qpeft"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080"]
