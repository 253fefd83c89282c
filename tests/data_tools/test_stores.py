"""Tools of `vlp data` whose input and output lie in a store: the same files as on this machine,
through every fault of every request.
"""

from __future__ import annotations

import pytest

from tests.data.loopback_store import Store
from tests.data.material import write_shards
from tests.data_tools.in_stores import (
    FILTER,
    content,
    local,
    vlp,
)


def test_what_a_store_holds_is_what_this_machine_would(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out") == 0
    assert content(server.root / "out") == here and len(here) > 10

    # A second call finds everything done, by one list of the folder: not by asking for each mark.
    before = len(server.requests)
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out") == 0
    again = server.requests[before:]
    assert not [request for request in again if request.startswith("PUT") and "tar" in request]
    assert not [request for request in again if request.startswith("HEAD") and "out/" in request]
    assert content(server.root / "out") == here


# Each tool with its options; {in}: the folder of its input, {file}: where it writes a file.
TOOLS = {
    "stats": ["{in}/train", "--to", "{out}", "--processes", 2],
    "negatives": ["{in}/train", "--to", "{out}"],
    "counting": ["{in}/count", "--to", "{out}"],
    "reshard": [
        "{in}/train::{in}/packed",
        "--to",
        "{out}",
        "--shuffle",
        0,
        "--samples-per-shard",
        5,
    ],
    "dedup": ["{in}/twins", "--to", "{out}", "--against", "{in}/train"],
    "dedup by cosine": [
        *("{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--distance", -1),
    ],
    "mine": ["{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--images"],
    "mine an order": [
        *("{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--order", 2),
    ],
    "filter by a share": [
        *("{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded"),
        *("--head", "near=cosine", "--top", "near=50%"),
    ],
    "balance": ["{in}/mined", "--to", "{out}", "--queries", "{in}/queries.txt", "--cap", 5],
    "concepts": [
        *("{in}/count", "--to", "{out}", "--wordnet", "{in}/wordnet", "--min-count", 1),
    ],
    "validate": ["{in}/train", "--json", "{out}/report.json", "--notes", "{out}"],
    "sheet": ["{in}/train", "--to", "{out}/sheet.html", "--samples", 3],
    "scenes": [
        *("--to", "{out}", "--train", 3, "--val", 0, "--test", 2, "--zeroshot", 0),
        *("--retrieval", 2, "--proofs", 0, "--size", 16, "--processes", 1),
    ],
    "pack": ["{in}/photos.tar", "--captions", "{in}/photos.csv", "--to", "{out}"],
}


QUICK = ("dedup by cosine",)


def of_tools() -> list:
    """All tools, most of them among the slow tests."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TOOLS]


@pytest.mark.parametrize("name", of_tools())
def test_every_tool(name, material, server, tmp_path):
    def called(folder: str, out: str) -> None:
        arguments = [str(word).format(**{"in": folder, "out": out}) for word in TOOLS[name]]
        status = vlp(name.split()[0], *arguments)
        assert status == 0

    (tmp_path / "here").mkdir()
    called(str(material), str(tmp_path / "here"))
    here = content(tmp_path / "here")
    called("s3://bucket", "s3://bucket/made/here")

    # Places stand in reports and lists for people.
    there = content(server.root / "made" / "here")
    for path, data in there.items():
        data = data.replace(b"s3://bucket", str(material).encode())
        there[path] = data.replace("s3: …/".encode(), "…/".encode())
    assert there == here and here
    assert not [path for path in server.root.rglob(".*") if path.is_file()]


def walk(
    server: Store,
    call: tuple,
    here: dict[str, bytes],
    faults: list[list[str]],
    every: int,
    stride: int = 1,
    bucket: str = "s3://bucket",
    patience: int = 20,  # more than the tries of all layers
) -> int:
    """Let each request of a call, or every `stride`-th, fail in turn, by the faults of its turn; in
    one of `every` turns so often that no patience outlasts it. Returns how many calls ended, and
    were made again.
    """
    server.requests.clear()
    assert vlp(*call, f"{bucket}/whole") == 0
    n_requests = len(server.requests)
    assert n_requests > 15

    n_ended = n_walked = 0
    for number in range(0, n_requests, stride):
        for fault in faults[number % len(faults)]:
            folder = f"{fault}{number}"
            server.requests.clear()
            n_faults = 1 if number % every else patience
            server.faulty = {number + i: fault for i in range(n_faults)}
            status = vlp(*call, f"{bucket}/{folder}")
            server.faulty = {}
            if status:
                n_ended += 1
                assert vlp(*call, f"{bucket}/{folder}") == 0
            # A note whose removal failed stays, and the call says so.
            there = content(server.root / folder)
            there.pop(".writer-1-of-1.json", None)
            assert there == here, (fault, number)
            n_walked += 1
    assert n_walked >= n_requests // stride
    return n_ended


FAULTS = ["error", "drop", "late", "cut"]


def test_a_request_may_fail(server, tmp_path):
    write_shards(server.root / "one", 1, 1)
    here = local(tmp_path, "filter", server.root / "one", "--min-words", 2)
    call = ("filter", "s3://bucket/one", "--min-words", 2, "--to")
    assert walk(server, call, here, [[fault] for fault in FAULTS], 2, stride=3) > 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_request_may_fail_in_every_way(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", "s3://bucket/in", *FILTER, "--to")
    assert walk(server, call, here, [FAULTS], 2) > 50
