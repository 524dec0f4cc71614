# The server: docker build -t iceformer . && docker run -v ./smollm2:/artifact:ro -p 8000:8000 iceformer
# It holds what a process needs to run an artifact, without a compiler and without what converts checkpoints.

FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/iceformer
COPY . /source
RUN /opt/iceformer/bin/pip install --no-cache-dir '/source[serve]'

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin iceformer
COPY --from=build /opt/iceformer /opt/iceformer
ENV PATH=/opt/iceformer/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
# Loading counts as healthy: who sends requests asks /health/ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
# SIGTERM lets requests finish: give `docker stop --time` more seconds than --drain.
STOPSIGNAL SIGTERM
ENTRYPOINT ["iceformer", "serve"]
CMD ["/artifact", "--host", "0.0.0.0"]
