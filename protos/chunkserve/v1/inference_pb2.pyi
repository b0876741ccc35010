from chunkserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("session_id", "chat", "text", "token_ids", "sampling", "compression", "request_id", "model", "wait_if_busy")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WAIT_IF_BUSY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    chat: _types_pb2.ChatInput
    text: str
    token_ids: _types_pb2.TokenIds
    sampling: _types_pb2.SamplingParams
    compression: _types_pb2.CompressionPolicy
    request_id: str
    model: str
    wait_if_busy: bool
    def __init__(self, session_id: _Optional[str] = ..., chat: _Optional[_Union[_types_pb2.ChatInput, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., wait_if_busy: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("prompt_info", "delta", "finish")
    PROMPT_INFO_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    prompt_info: PromptInfo
    delta: _types_pb2.TokenDelta
    finish: _types_pb2.Finish
    def __init__(self, prompt_info: _Optional[_Union[PromptInfo, _Mapping]] = ..., delta: _Optional[_Union[_types_pb2.TokenDelta, _Mapping]] = ..., finish: _Optional[_Union[_types_pb2.Finish, _Mapping]] = ...) -> None: ...

class PromptInfo(_message.Message):
    __slots__ = ("request_id", "num_prompt_tokens", "num_reused_tokens", "num_prefilled_tokens", "num_kept_tokens", "full_kv_bytes", "stored_bytes", "fetched_bytes", "tokenize_ms", "prefill_ms", "compression_ms", "store_ms", "fetch_ms", "prefill_worker", "decode_worker", "rebuilt", "num_rebuilt_tokens", "num_shared_tokens", "replayed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FULL_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_MS_FIELD_NUMBER: _ClassVar[int]
    STORE_MS_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    REBUILT_FIELD_NUMBER: _ClassVar[int]
    NUM_REBUILT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    num_prompt_tokens: int
    num_reused_tokens: int
    num_prefilled_tokens: int
    num_kept_tokens: int
    full_kv_bytes: int
    stored_bytes: int
    fetched_bytes: int
    tokenize_ms: float
    prefill_ms: float
    compression_ms: float
    store_ms: float
    fetch_ms: float
    prefill_worker: str
    decode_worker: str
    rebuilt: bool
    num_rebuilt_tokens: int
    num_shared_tokens: int
    replayed: bool
    def __init__(self, request_id: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_reused_tokens: _Optional[int] = ..., num_prefilled_tokens: _Optional[int] = ..., num_kept_tokens: _Optional[int] = ..., full_kv_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., tokenize_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., compression_ms: _Optional[float] = ..., store_ms: _Optional[float] = ..., fetch_ms: _Optional[float] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., rebuilt: _Optional[bool] = ..., num_rebuilt_tokens: _Optional[int] = ..., num_shared_tokens: _Optional[int] = ..., replayed: _Optional[bool] = ...) -> None: ...

class CountTokensRequest(_message.Message):
    __slots__ = ("model", "chat", "text", "token_ids")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    chat: _types_pb2.ChatInput
    text: str
    token_ids: _types_pb2.TokenIds
    def __init__(self, model: _Optional[str] = ..., chat: _Optional[_Union[_types_pb2.ChatInput, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class CountTokensResponse(_message.Message):
    __slots__ = ("num_tokens", "model")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    model: str
    def __init__(self, num_tokens: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "max_model_len", "fingerprint", "num_prefill_workers", "num_decode_workers", "default_compression")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_model_len: int
    fingerprint: str
    num_prefill_workers: int
    num_decode_workers: int
    default_compression: _types_pb2.CompressionPolicy
    def __init__(self, name: _Optional[str] = ..., max_model_len: _Optional[int] = ..., fingerprint: _Optional[str] = ..., num_prefill_workers: _Optional[int] = ..., num_decode_workers: _Optional[int] = ..., default_compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ...) -> None: ...
