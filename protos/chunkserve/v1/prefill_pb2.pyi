from chunkserve.v1 import manifest_pb2 as _manifest_pb2
from chunkserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("manifest", "chat", "text", "token_ids", "compression", "min_free_tokens")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    MIN_FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    manifest: _manifest_pb2.Manifest
    chat: _types_pb2.ChatInput
    text: str
    token_ids: _types_pb2.TokenIds
    compression: _types_pb2.CompressionPolicy
    min_free_tokens: int
    def __init__(self, manifest: _Optional[_Union[_manifest_pb2.Manifest, _Mapping]] = ..., chat: _Optional[_Union[_types_pb2.ChatInput, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., min_free_tokens: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("manifest", "num_new_tokens", "num_prefilled_tokens", "full_kv_bytes_per_token", "tokenize_ms", "prefill_ms", "compression_ms", "store_ms", "worker_id", "compression", "num_shared_tokens", "num_rebuilt_tokens")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    NUM_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FULL_KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_MS_FIELD_NUMBER: _ClassVar[int]
    STORE_MS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_REBUILT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    manifest: _manifest_pb2.Manifest
    num_new_tokens: int
    num_prefilled_tokens: int
    full_kv_bytes_per_token: int
    tokenize_ms: float
    prefill_ms: float
    compression_ms: float
    store_ms: float
    worker_id: str
    compression: _types_pb2.CompressionPolicy
    num_shared_tokens: int
    num_rebuilt_tokens: int
    def __init__(self, manifest: _Optional[_Union[_manifest_pb2.Manifest, _Mapping]] = ..., num_new_tokens: _Optional[int] = ..., num_prefilled_tokens: _Optional[int] = ..., full_kv_bytes_per_token: _Optional[int] = ..., tokenize_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., compression_ms: _Optional[float] = ..., store_ms: _Optional[float] = ..., worker_id: _Optional[str] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., num_shared_tokens: _Optional[int] = ..., num_rebuilt_tokens: _Optional[int] = ...) -> None: ...

class RebuildRequest(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: _manifest_pb2.Manifest
    def __init__(self, manifest: _Optional[_Union[_manifest_pb2.Manifest, _Mapping]] = ...) -> None: ...

class RebuildResponse(_message.Message):
    __slots__ = ("manifest", "num_rebuilt_tokens", "prefill_ms", "worker_id")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    NUM_REBUILT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    manifest: _manifest_pb2.Manifest
    num_rebuilt_tokens: int
    prefill_ms: float
    worker_id: str
    def __init__(self, manifest: _Optional[_Union[_manifest_pb2.Manifest, _Mapping]] = ..., num_rebuilt_tokens: _Optional[int] = ..., prefill_ms: _Optional[float] = ..., worker_id: _Optional[str] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("chat", "text", "token_ids")
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    chat: _types_pb2.ChatInput
    text: str
    token_ids: _types_pb2.TokenIds
    def __init__(self, chat: _Optional[_Union[_types_pb2.ChatInput, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_types_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...
