import datetime

from chunkserve.v1 import session_pb2 as _session_pb2
from chunkserve.v1 import types_pb2 as _types_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Manifest(_message.Message):
    __slots__ = ("tenant", "session_id", "version", "model", "model_fingerprint", "token_ids", "segments", "compression", "create_time", "update_time", "ttl", "num_turns", "last_decode_worker")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
    LAST_DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    session_id: str
    version: int
    model: str
    model_fingerprint: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedCompositeFieldContainer[_session_pb2.Segment]
    compression: _types_pb2.CompressionPolicy
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    ttl: _duration_pb2.Duration
    num_turns: int
    last_decode_worker: str
    def __init__(self, tenant: _Optional[str] = ..., session_id: _Optional[str] = ..., version: _Optional[int] = ..., model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[_Union[_session_pb2.Segment, _Mapping]]] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., num_turns: _Optional[int] = ..., last_decode_worker: _Optional[str] = ...) -> None: ...

class TurnResult(_message.Message):
    __slots__ = ("request_digest", "num_prompt_tokens", "answer", "finish")
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    request_digest: bytes
    num_prompt_tokens: int
    answer: _types_pb2.TokenDelta
    finish: _types_pb2.Finish
    def __init__(self, request_digest: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., answer: _Optional[_Union[_types_pb2.TokenDelta, _Mapping]] = ..., finish: _Optional[_Union[_types_pb2.Finish, _Mapping]] = ...) -> None: ...
