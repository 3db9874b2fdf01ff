# docker build --target cuda -t saejax:cuda .     (or cpu, tpu)
# docker run --rm --gpus all -v "$PWD":/runs saejax:cuda train sae=topk
# The base is pinned to a release of Python and of Debian; pin it by digest where builds must repeat bit for bit.
FROM python:3.12.12-slim-bookworm AS base

# Further extras of saejax, comma separated: demo, wandb, torch, hub, submitit, optuna.
ARG EXTRAS=wandb,submitit
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY saejax saejax
RUN pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && useradd --uid 1000 --create-home saejax \
    && install --directory --owner saejax /runs

FROM base AS cuda-libraries
RUN pip install --constraint constraints.txt "jax[cuda13]"

FROM base AS tpu-libraries
RUN pip install --constraint constraints.txt "jax[tpu]"

FROM tpu-libraries AS tpu
USER 1000
WORKDIR /runs
ENTRYPOINT ["saejax"]
CMD ["--help"]

FROM cuda-libraries AS cuda
USER 1000
WORKDIR /runs
ENTRYPOINT ["saejax"]
CMD ["--help"]

# The last one is what `docker build` makes when no target is named.
FROM base AS cpu
USER 1000
WORKDIR /runs
ENTRYPOINT ["saejax"]
CMD ["--help"]
