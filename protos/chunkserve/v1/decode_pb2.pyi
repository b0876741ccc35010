from chunkserve.v1 import manifest_pb2 as _manifest_pb2
from chunkserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("manifest", "sampling", "num_resumed_tokens", "compression", "request_id", "request_digest", "feed_id", "feed_key")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NUM_RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FEED_ID_FIELD_NUMBER: _ClassVar[int]
    FEED_KEY_FIELD_NUMBER: _ClassVar[int]
    manifest: _manifest_pb2.Manifest
    sampling: _types_pb2.SamplingParams
    num_resumed_tokens: int
    compression: _types_pb2.CompressionPolicy
    request_id: str
    request_digest: bytes
    feed_id: str
    feed_key: int
    def __init__(self, manifest: _Optional[_Union[_manifest_pb2.Manifest, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., num_resumed_tokens: _Optional[int] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., request_id: _Optional[str] = ..., request_digest: _Optional[bytes] = ..., feed_id: _Optional[str] = ..., feed_key: _Optional[int] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("started", "delta", "finish")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    started: DecodeStarted
    delta: _types_pb2.TokenDelta
    finish: _types_pb2.Finish
    def __init__(self, started: _Optional[_Union[DecodeStarted, _Mapping]] = ..., delta: _Optional[_Union[_types_pb2.TokenDelta, _Mapping]] = ..., finish: _Optional[_Union[_types_pb2.Finish, _Mapping]] = ...) -> None: ...

class DecodeStarted(_message.Message):
    __slots__ = ("worker_id", "fetched_bytes", "fetch_ms", "num_kept_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    fetched_bytes: int
    fetch_ms: float
    num_kept_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., fetched_bytes: _Optional[int] = ..., fetch_ms: _Optional[float] = ..., num_kept_tokens: _Optional[int] = ...) -> None: ...

class FeedTokensRequest(_message.Message):
    __slots__ = ("feed_id",)
    FEED_ID_FIELD_NUMBER: _ClassVar[int]
    feed_id: str
    def __init__(self, feed_id: _Optional[str] = ...) -> None: ...

class FeedTokensResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[FedTokens]
    def __init__(self, tokens: _Optional[_Iterable[_Union[FedTokens, _Mapping]]] = ...) -> None: ...

class FedTokens(_message.Message):
    __slots__ = ("feed_key", "delta")
    FEED_KEY_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    feed_key: int
    delta: _types_pb2.TokenDelta
    def __init__(self, feed_key: _Optional[int] = ..., delta: _Optional[_Union[_types_pb2.TokenDelta, _Mapping]] = ...) -> None: ...

class HoldTokensRequest(_message.Message):
    __slots__ = ("feed_id", "feed_key", "is_held")
    FEED_ID_FIELD_NUMBER: _ClassVar[int]
    FEED_KEY_FIELD_NUMBER: _ClassVar[int]
    IS_HELD_FIELD_NUMBER: _ClassVar[int]
    feed_id: str
    feed_key: int
    is_held: bool
    def __init__(self, feed_id: _Optional[str] = ..., feed_key: _Optional[int] = ..., is_held: _Optional[bool] = ...) -> None: ...

class HoldTokensResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
