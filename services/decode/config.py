"""Settings of the decode workers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.models.weights import WeightsDtype
from services.runtime.config import ServiceSettings


class DecodeSettings(ServiceSettings):
    """What the decode pool and each of its workers need to know.

    Attributes:
        model: Local folder in the Hugging Face layout, or a hub id.
        model_name: Name that requests give; the last part of ``model`` if empty.
        device: A torch device.
        dtype: Of the weights; ``auto``: as stored.
        weights_dtype: Of the linear layers while they work (``services.models.weights``).
        torch_threads: Threads of one forward pass; 0: torch's default.
        decode_replicas: Workers of the pool.
        decode_host: Host that a worker's gRPC server binds.
        decode_port: Its port; 0: a free one. Any other allows one worker per machine.
        advertise_host: Host that the gateway reaches a worker by; empty: the address of the machine
            that the worker is on.
        kv_bytes: Memory for KV, per worker: of running answers, and of finished turns for as long
            as there is room. Committed by the operating system as it is used.
        num_slots: Answers that a worker generates at once at most.
        queue_size: Requests that wait for a slot, or for memory, at most.
        prefill_chunk_tokens: Pending tokens in one forward pass at most.
        max_stall_ms: Milliseconds by which pending tokens may lengthen a step of running streams.
        max_output_tokens: Most tokens of an answer where the request names no number.
        replica_num_cpus: CPUs that Ray sets aside for a worker. The model's threads are not
            bound to them.
        replica_num_gpus: GPUs that Ray gives to a worker.
        ray_num_cpus: CPUs of the local Ray, if none is given by ``RAY_ADDRESS``; 0: as many as
            the workers need.
        ray_object_store_bytes: Shared memory of the local Ray, which no tokens go through.
        ready_timeout_s: Seconds until all workers must have announced themselves.
    """

    model: str = Field(min_length=1)
    model_name: str = ""
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights_dtype: WeightsDtype = "auto"
    torch_threads: int = Field(default=0, ge=0)
    decode_replicas: int = Field(default=1, ge=1)
    decode_host: str = "127.0.0.1"
    decode_port: int = Field(default=0, ge=0, le=65535)
    advertise_host: str = "127.0.0.1"
    kv_bytes: int = Field(default=4 << 30, ge=1)
    num_slots: int = Field(default=32, ge=1)
    queue_size: int = Field(default=64, ge=0)
    prefill_chunk_tokens: int = Field(default=256, ge=1, le=256)
    max_stall_ms: float = Field(default=50, gt=0, allow_inf_nan=False)
    max_output_tokens: int = Field(default=1024, ge=1)
    replica_num_cpus: float = Field(default=1, ge=0)
    replica_num_gpus: float = Field(default=0, ge=0)
    ray_num_cpus: int = Field(default=0, ge=0)
    ray_object_store_bytes: int = Field(default=200 << 20, ge=80 << 20)
    ready_timeout_s: float = Field(default=300, gt=0, allow_inf_nan=False)
