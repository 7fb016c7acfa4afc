# All five packages on Ascend NPUs, from the top of a clone. CHIP is 910b (Atlas A2) or a3 (Atlas A3):
#   docker build -f docker/ascend.Dockerfile --build-arg CHIP=910b -t ascendspeed:a2 .
#   docker build -f docker/ascend.Dockerfile --build-arg CHIP=a3 -t ascendspeed:a3 .
#   docker run --rm -it --ipc=host --device=/dev/davinci0 --device=/dev/davinci_manager \
#     --device=/dev/devmm_svm --device=/dev/hisi_hdc -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro \
#     -v /usr/local/dcmi:/usr/local/dcmi:ro -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro \
#     -v "$PWD:/work" ascendspeed:a2 asd-core --help
# CANN, torch and torch_npu fit each other by torch_npu's own table (docs/versions.md).
ARG CHIP=910b
ARG CANN=9.0.0
FROM quay.io/ascend/cann:${CANN}-${CHIP}-ubuntu22.04-py3.11

ARG TORCH=2.10.0
ARG TORCH_NPU=2.10.0
WORKDIR /opt/ascendspeed
COPY constraints.txt ./
# torch_npu is built for the CPU build of torch of the same number, on x86 and on ARM.
RUN sed -i '/^torch==/d' constraints.txt \
    && pip install --no-cache-dir "torch==${TORCH}" --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir "torch_npu==${TORCH_NPU}"
COPY packages packages
RUN pip install --no-cache-dir -c constraints.txt \
    ./packages/ascendspeed-data "./packages/ascendspeed-core[npu,deepspeed]" ./packages/ascendspeed-ckpt \
    "./packages/ascendspeed-infer[serve,structured]" ./packages/ascendspeed-eval

# The image's shells source CANN's set_env.sh; a command that is not run by a shell needs it too.
COPY docker/ascend-entrypoint.sh /usr/local/bin/ascend-entrypoint
ENTRYPOINT ["/usr/local/bin/ascend-entrypoint"]
WORKDIR /work
CMD ["asd-core", "--help"]
