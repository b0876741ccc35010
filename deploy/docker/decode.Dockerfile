# A node of the decode pool: Ray's head with the pool's driver (ray-head.sh), or a node that joins it
# (ray-node.sh). Each node runs one decode worker.
ARG PYTHON_IMAGE=python:3.11-slim
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY LICENSE README.md pyproject.toml ./
COPY chunkkv chunkkv
COPY services services
COPY protos protos
COPY clients clients
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN groupadd --gid 10001 chunkserve \
    && useradd --uid 10001 --gid chunkserve --create-home chunkserve
WORKDIR /build
COPY constraints.txt ./

# Where pip finds torch: by default PyTorch's builds for CPUs. Another index brings builds for GPUs
# (https://download.pytorch.org/whl/cu130); empty, it is pip's own.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN grep '^torch==' constraints.txt >torch.txt \
    && pip install --no-cache-dir --no-deps ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} \
        -r torch.txt

COPY pyproject.toml deploy/docker/list_requirements.py ./
RUN python list_requirements.py services <pyproject.toml >requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl
COPY deploy/docker/entrypoint.sh deploy/docker/ray-head.sh deploy/docker/ray-node.sh /usr/local/bin/

USER 10001:10001
WORKDIR /home/chunkserve
ENV CHUNKSERVE_DECODE_HOST=0.0.0.0 CHUNKSERVE_DECODE_PORT=50053 CHUNKSERVE_ADVERTISE_HOST=""
# Without a token, whoever reaches Ray's ports can run code in its cluster.
# At normal priority: Ray would give its workers the last turn on the CPU.
ENV RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
EXPOSE 50053
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-m", "services.runtime.probe", "127.0.0.1:50053"]
ENTRYPOINT ["entrypoint.sh"]
CMD ["ray-head.sh"]
LABEL org.opencontainers.image.title="chunkserve-decode" \
    org.opencontainers.image.description="Node of ChunkServe's decode pool" \
    org.opencontainers.image.licenses="Apache-2.0"
