# Images with the `mira` command: `docker build --target cpu .` or `docker build --target cuda .` (docs/containers.md).
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HOME=/home/mira
# A new volume has the owner and the mode of its place in the image. `docker run --user` may name a user that has no home.
RUN useradd --create-home --uid 1000 mira \
    && mkdir /work /home/mira/.cache \
    && chown mira:mira /work /home/mira/.cache \
    && chmod 755 /home/mira \
    && chmod 1777 /home/mira/.cache
WORKDIR /build
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src ./src

# torch with the CUDA libraries that the package index has it with.
FROM base AS cuda
RUN pip install --constraint constraints.txt '.[datasets,flower,privacy,quantized]'
USER 1000
WORKDIR /work
ENTRYPOINT ["mira"]
CMD ["--help"]

# The CPU build of torch, from PyTorch's own index: 200 MB instead of several GB. The last stage is the default target.
FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" '.[datasets,flower,privacy,quantized]'
USER 1000
WORKDIR /work
ENTRYPOINT ["mira"]
CMD ["--help"]
