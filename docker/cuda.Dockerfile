# All five packages on NVIDIA GPUs, from the top of a clone:
#   docker build -f docker/cuda.Dockerfile -t ascendspeed:cuda .
#   docker run --rm -it --gpus all --ipc=host -v "$PWD:/work" ascendspeed:cuda asd-core --help
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# torch.compile and Triton's kernels are compiled where they run: they need a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=2.13.0
WORKDIR /opt/ascendspeed
COPY constraints.txt ./
# PyPI's torch for Linux brings CUDA, cuDNN and NCCL as wheels; the host needs only NVIDIA's driver.
RUN sed -i '/^torch==/d' constraints.txt && pip install --no-cache-dir "torch==${TORCH}"
COPY packages packages
RUN pip install --no-cache-dir -c constraints.txt \
    ./packages/ascendspeed-data "./packages/ascendspeed-core[deepspeed]" ./packages/ascendspeed-ckpt \
    "./packages/ascendspeed-infer[serve,structured]" ./packages/ascendspeed-eval

RUN useradd --create-home ascendspeed
USER ascendspeed
WORKDIR /work
CMD ["asd-core", "--help"]
