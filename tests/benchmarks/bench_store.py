"""How close the store comes to a bare socket: 64 MiB in parts of 1 MiB over a unix socket.

    python -m tests.benchmarks.bench_store [--json FILE]

All readers are measured in one run, by turns, against one server: figures of shared machines vary
2 to 3 times between runs, ratios within a run far less. ``raw`` is the limit: GETs written by
hand, answers received into one reused buffer and not looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import redis
import xxhash

import chunkkv
from chunkserve.v1 import manifest_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import fetched_segments, store_segment
from services.store import Store, open_store
from services.store.connect import parse_store_url
from services.store.embedded import EmbeddedOptions, EmbeddedValkey

MIB = 1 << 20
SEGMENT_ID = "benchmark"
TTL_S = 600.0


@dataclass(frozen=True, slots=True)
class Case:
    """Something to measure.

    Attributes:
        name: What the table calls it.
        run: Moves the bytes once.
        baseline: Name of the case whose throughput is 100 %.
        prepare: Called before every run, and not measured.
    """

    name: str
    run: Callable[[], None]
    baseline: str
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured.

    Attributes:
        name: The case.
        mib_per_s: Median over the rounds.
        of_baseline: Median of the ratios to the baseline in the same round.
        baseline: Name of that case.
    """

    name: str
    mib_per_s: float
    of_baseline: float
    baseline: str


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=64, help="parts of 1 MiB (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (%(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

    with EmbeddedValkey(EmbeddedOptions(maxmemory_bytes=4 << 30)) as server:
        cases = fetch_cases(server.url, options.parts) + put_cases(server.url, options.parts)
        results = measure(cases, size_bytes=options.parts * MIB, rounds=options.rounds)
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2))


def measure(cases: Sequence[Case], *, size_bytes: int, rounds: int) -> list[Result]:
    """Run all cases by turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for i in range(rounds + 1):
        for case in cases:
            case.prepare()
            start = time.perf_counter()
            case.run()
            elapsed = time.perf_counter() - start
            if i > 0:
                seconds[case.name].append(elapsed)
    return [
        Result(
            name=case.name,
            mib_per_s=size_bytes / MIB / statistics.median(seconds[case.name]),
            of_baseline=statistics.median(
                baseline / own
                for baseline, own in zip(seconds[case.baseline], seconds[case.name], strict=True)
            ),
            baseline=case.baseline,
        )
        for case in cases
    ]


def print_table(results: Sequence[Result]) -> None:
    """Print the results."""
    print(f"{'':28}{'MiB/s':>8}{'of':>7}")
    for result in results:
        print(f"{result.name:28}{result.mib_per_s:8.0f}{result.of_baseline:7.0%} {result.baseline}")


def fetch_cases(url: str, num_parts: int) -> list[Case]:
    """Return the ways to read a segment of ``num_parts`` MiB."""
    store = open_store(url)
    part = os.urandom(MIB)
    store.put_segment(SEGMENT_ID, b"header", [part] * num_parts, ttl_s=TTL_S)
    sizes = [MIB] * num_parts
    digest = xxhash.xxh3_64_intdigest(part)
    out = memoryview(bytearray(num_parts * MIB))
    client = redis.Redis.from_url(url)
    names = sorted(client.scan_iter(match=f"*{{{SEGMENT_ID}}}:*:*", count=1000))

    def fetch() -> None:
        for _ in store.fetch_parts(SEGMENT_ID, sizes, out):
            pass

    def fetch_and_verify() -> None:
        for view in store.fetch_parts(SEGMENT_ID, sizes, out):
            assert xxhash.xxh3_64_intdigest(view) == digest

    def redis_py() -> None:
        for name in names:
            client.get(name)

    return [
        Case("raw read", RawSocket(url).reader(names), baseline="raw read"),
        Case("fetch", fetch, baseline="raw read"),
        Case("fetch + verify", fetch_and_verify, baseline="raw read"),
        Case("fetch + verify + decode", decode_case(store, num_parts), baseline="raw read"),
        Case("redis-py get", redis_py, baseline="raw read"),
    ]


def decode_case(store: Store, num_parts: int) -> Callable[[], None]:
    """Return what a decode worker does to open a segment of about ``num_parts`` MiB."""
    span = chunkkv.CompressedKV.empty(_shape_of(num_parts * MIB))
    span.memory.random_(0, 256)
    manifest = manifest_pb2.Manifest(session_id="s", token_ids=range(span.num_tokens))
    segment = store_segment(store, span, manifest, ttl_s=TTL_S)
    pool = ReceivePool()

    def open_segment() -> None:
        with fetched_segments(store, [segment], fingerprint="model", pool=pool) as fetched:
            assert fetched.kv[0].num_tokens == span.num_tokens

    return open_segment


def _shape_of(size_bytes: int) -> chunkkv.SpanShape:
    """Return the shape of a span of SmolLM2-135M (float32) that takes about ``size_bytes``."""
    num_layers, num_kv_heads, head_dim = 30, 3, 64
    per_token = num_layers * (2 * num_kv_heads * head_dim * 4 + 8)
    kept = size_bytes // per_token
    layer = chunkkv.LayerShape((kept,) * num_kv_heads, head_dim, head_dim, index_list=0)
    return chunkkv.SpanShape(
        fingerprint="model",
        policy="benchmark",
        first_token=0,
        num_tokens=kept,
        dtype="float32",
        layers=tuple(dataclasses.replace(layer, index_list=i) for i in range(num_layers)),
        index_lengths=(kept,) * num_layers,
        has_scores=True,
    )


def put_cases(url: str, num_parts: int) -> list[Case]:
    """Return the ways to write as much."""
    store = open_store(url)
    client = redis.Redis.from_url(url)
    memory = memoryview(bytearray(os.urandom(num_parts * MIB)))
    parts = [memory[i * MIB : (i + 1) * MIB] for i in range(num_parts)]
    names = [f"plain-{i}".encode() for i in range(num_parts)]

    def put() -> None:
        store.put_segment("written", b"header", parts, ttl_s=TTL_S)

    def redis_py() -> None:
        for name, part in zip(names, parts, strict=True):
            client.set(name, part, ex=int(TTL_S))

    return [
        Case("raw write", RawSocket(url).writer(names, parts), baseline="raw write"),
        Case("put", put, baseline="raw write", prepare=lambda: store.delete_segments(["written"])),
        Case("redis-py set", redis_py, baseline="raw write"),
    ]


class RawSocket:
    """The limit: as little as can be done to move the bytes."""

    def __init__(self, url: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(parse_store_url(url).where.removeprefix("unix:"))

    def reader(self, names: Sequence[bytes]) -> Callable[[], None]:
        """Return a function that gets values of 1 MiB, one by one, and looks at nothing."""
        commands = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name) for name in names]
        answer = memoryview(bytearray(len(f"${MIB}\r\n\r\n") + MIB))

        def read() -> None:
            for command in commands:
                self._socket.sendall(command)
                num_received = 0
                while num_received < len(answer):
                    num_received += self._socket.recv_into(answer[num_received:])

        return read

    def writer(self, names: Sequence[bytes], values: Sequence[memoryview]) -> Callable[[], None]:
        """Return a function that sets values, one by one, and looks at nothing."""
        heads = [
            b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, len(value))
            for name, value in zip(names, values, strict=True)
        ]

        def write() -> None:
            for head, value in zip(heads, values, strict=True):
                self._socket.sendall(head)
                self._socket.sendall(value)
                self._socket.sendall(b"\r\n")
                self._socket.recv(64)

        return write


if __name__ == "__main__":
    main()
