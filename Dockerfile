# docker build --build-arg ACCELERATOR=cuda13 -t saejax .
# docker run --rm --gpus all -v "$PWD":/runs saejax train sae=topk
FROM python:3.12-slim

# cpu, cuda13 or tpu: the extra of jax that carries the device's libraries.
ARG ACCELERATOR=cpu
# Further extras of saejax, comma separated: demo, wandb, submitit, torch.
ARG EXTRAS=wandb

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY saejax saejax
RUN accelerator="${ACCELERATOR#cpu}" \
    && pip install --constraint constraints.txt ".[${EXTRAS}]" ${accelerator:+"jax[${accelerator}]"} \
    && useradd --uid 1000 --create-home saejax \
    && install --directory --owner saejax /runs

USER 1000
WORKDIR /runs
ENTRYPOINT ["saejax"]
CMD ["--help"]
