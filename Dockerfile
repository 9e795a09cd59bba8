# One image for every service of docker-compose.yml: `docker build -t hpo .`

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE docker-compose.yml ./
COPY hpo hpo
COPY models models
COPY data data
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim
# Nothing in the working directory shadows a package; /code may be mounted read-only; logs come at once.
ENV PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# Folders that volumes are mounted over must be the user's own already: Docker copies the owner to a new volume.
RUN useradd --create-home --uid 1000 hpo \
    && install --directory --owner=hpo --group=hpo /checkpoints /code
COPY constraints.txt /tmp/
COPY --from=wheel /wheel /tmp/wheel
# The cache mount keeps torch's gigabytes out of the image and from being downloaded for each change of our code.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint /tmp/constraints.txt /tmp/wheel/*.whl
USER hpo
WORKDIR /code
ENTRYPOINT ["hpo"]
