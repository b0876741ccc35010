# The session store: Valkey, as a user without privileges, with a password and an append-only file.
ARG VALKEY_IMAGE=valkey/valkey:9
# hadolint ignore=DL3006
FROM ${VALKEY_IMAGE}

COPY deploy/docker/valkey.conf /etc/valkey/valkey.conf

# The base image gives this user its number.
# hadolint ignore=DL3066
USER valkey
VOLUME /data
EXPOSE 6379
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=6 \
    CMD ["sh", "-c", "REDISCLI_AUTH=$(cat /run/secrets/redis_password) valkey-cli ping | grep -qx PONG"]
ENTRYPOINT ["valkey-server", "/etc/valkey/valkey.conf"]
LABEL org.opencontainers.image.title="chunkserve-redis" \
    org.opencontainers.image.description="Session store of ChunkServe"
