# Kinema in a container, with the commands of the README inside it.
#
#   docker build -t kinema .                                  CPU
#   docker build -t kinema-cuda --build-arg DEVICE=cuda .     CUDA, with flash-attention's compiler at hand
#   docker run --rm --shm-size 2g -v "$PWD/runs:/home/kinema/kinema/runs" kinema make demo
#   docker run --rm --shm-size 2g --gpus all kinema-cuda make test
ARG DEVICE=cpu

FROM python:3.11-slim-bookworm AS base-cpu

# nvcc, for DeepSpeed's and flash-attention's kernels; torch brings its own CUDA libraries.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS base-cuda

# hadolint ignore=DL3006
FROM base-${DEVICE} AS kinema
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A C++ compiler and make: DeepSpeed compiles one small op at set-up. git: the run records the revision.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential git \
 && if ! command -v python3 >/dev/null; then \
      apt-get install -y --no-install-recommends python3 python3-dev python3-venv; fi \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 kinema
USER 10001
WORKDIR /home/kinema/kinema
RUN mkdir runs data

# Dependencies first: they change seldom, and this layer is the large one.
COPY --chown=kinema:kinema pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY --chown=kinema:kinema src src
RUN make setup
COPY --chown=kinema:kinema . .

CMD ["make", "demo"]
