# A compression worker. It has no model and needs no GPU.
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

# Where pip finds torch: PyTorch's builds for CPUs. Empty, it is pip's own.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN grep '^torch==' constraints.txt >torch.txt \
    && pip install --no-cache-dir --no-deps ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} \
        -r torch.txt

COPY pyproject.toml deploy/docker/list_requirements.py ./
RUN python list_requirements.py library server <pyproject.toml >requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl
COPY deploy/docker/entrypoint.sh /usr/local/bin/

USER 10001:10001
WORKDIR /home/chunkserve
ENV CHUNKSERVE_ADVERTISE_HOST=""
ENV CHUNKSERVE_LISTEN=0.0.0.0:50054
EXPOSE 50054
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "services.runtime.probe", "127.0.0.1:50054"]
ENTRYPOINT ["entrypoint.sh"]
CMD ["python", "-m", "services.compress"]
LABEL org.opencontainers.image.title="chunkserve-compress" \
    org.opencontainers.image.description="Compression worker of ChunkServe" \
    org.opencontainers.image.licenses="Apache-2.0"
