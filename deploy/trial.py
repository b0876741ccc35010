"""Asks a running cluster two questions in one session, each answered by another decode worker.

``python deploy/trial.py`` needs the client alone (``pip install 'chunkserve[client]'``). It prints
both answers, the right ones beside them, and what was done with each prompt. With ``--session`` it
asks the second question once more in a session of before, for example after a worker was killed.
Exit code 1: the same worker answered twice, or an answer is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pydoc_data.topics import topics

from chunkserve_client import DEFAULT_ADDRESS, ChunkServeError, Compression, SyncClient, SyncSession

FIRST = ("What is the access code of the north door?", "4718")
SECOND = ("What is the telephone number of Dr. Lindqvist?", "5539")


def document() -> str:
    """Return about 1,500 tokens of Python's documentation, with two facts in it."""
    prose = topics["naming"].split("\n\n")[2:36]
    prose.insert(10, "The access code of the north door is 4718.")
    prose.insert(20, "The telephone number of Dr. Lindqvist is 5539.")
    return "\n\n".join(prose)


def ask(session: SyncSession, prompt: str, right_answer: str, avoid_worker: str = "") -> str:
    """Stream an answer, say what was done, and return the decode worker's id.

    Raises:
        SystemExit: The right answer is not in it.
    """
    started = time.perf_counter()
    answer = session.generate(prompt, max_tokens=40, avoid_worker=avoid_worker)
    print("\nanswer: ", end="")
    for text in answer:
        print(text, end="", flush=True)
    print(f"\nright:  {right_answer}    ({time.perf_counter() - started:.2f} s)")
    assert answer.prompt_info is not None
    for name, value in asdict(answer.prompt_info).items():
        print(f"  {name:22} {value}")
    if right_answer not in answer.text:
        sys.exit(f"error: {right_answer} is not in the answer")
    return answer.prompt_info.decode_worker


def two_turns(client: SyncClient) -> None:
    """Ask both questions in a new session.

    Raises:
        SystemExit: The same worker answered both.
    """
    session = client.create_session(compression=Compression(keep_ratio=0.5))
    print(f"session {session.session_id}")
    first = ask(session, f"{document()}\n\n{FIRST[0]}", FIRST[1])
    second = ask(session, *SECOND, avoid_worker=first)
    if first == second:
        sys.exit("error: the same decode worker answered both questions")
    print(f"\n{first} and {second} answered in one session")


def main() -> None:
    """Run the trial."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port of the gateway")
    parser.add_argument("--session", help="session of an earlier run: ask one more question in it")
    arguments = parser.parse_args()
    with SyncClient(arguments.address) as client:
        try:
            if arguments.session:
                ask(client.get_session(arguments.session), *SECOND)
            else:
                two_turns(client)
        except ChunkServeError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
