# All five packages on a CPU, from the top of a clone:
#   docker build -f docker/cpu.Dockerfile -t ascendspeed:cpu .
#   docker run --rm -it -v "$PWD:/work" ascendspeed:cpu asd-core --help
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# A newer torch than the pinned one: --build-arg TORCH=...
ARG TORCH=2.13.0
WORKDIR /opt/ascendspeed
COPY constraints.txt ./
# torch first and alone: asked for together with others, pip may resolve it to a build with CUDA.
RUN sed -i '/^torch==/d' constraints.txt \
    && pip install --no-cache-dir "torch==${TORCH}" --index-url https://download.pytorch.org/whl/cpu
COPY packages packages
RUN pip install --no-cache-dir -c constraints.txt \
    ./packages/ascendspeed-data "./packages/ascendspeed-core[deepspeed]" ./packages/ascendspeed-ckpt \
    "./packages/ascendspeed-infer[serve,structured]" ./packages/ascendspeed-eval

RUN useradd --create-home ascendspeed
USER ascendspeed
WORKDIR /work
CMD ["asd-core", "--help"]
