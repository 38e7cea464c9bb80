FROM python:3.13.16-slim-trixie AS base

FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-deps --require-hashes -r requirements.lock
# The development lock pins the build backend; its packages stay in this stage.
COPY requirements-dev.lock ./
RUN pip install --no-deps --require-hashes -r requirements-dev.lock
COPY LICENSE README.md pyproject.toml ./
COPY service/ service/
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && pip --python /opt/venv/bin/python install --no-deps dist/*.whl
# Without test suites, type stubs and C sources. Byte code stays: nobody may write it later, and a start would pay for it.
RUN find /opt/venv -type d \( -name test -o -name tests \) -prune -exec rm -rf {} + \
    && find /opt/venv -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.[ch]' -o -name '*.hpp' \) -delete

FROM base
# Modules come from the environment only, never from the working directory, which the service can write to.
ENV HOST=0.0.0.0 PYTHONSAFEPATH=1
COPY --from=build /opt/venv /opt/venv
# /app/data is a volume's place: a named one takes its owner from here.
RUN install -d -o 10001 -g 10001 /app /app/data
WORKDIR /app
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client: unlike urllib it takes no proxy from the environment.
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s CMD ["/opt/venv/bin/python", "-c", "import os, sys; from http.client import HTTPConnection; c = HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=2); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["/opt/venv/bin/python", "-m", "service"]
