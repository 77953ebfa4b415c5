"""What lies outside of the hub: large files by sha256, and the Xet storage (its HTTP protocol, version 1).

Xet cuts files into chunks and packs those into xorbs; a shard says which runs of chunks make up which file. Nothing is
decompressed here: a download is told where its chunks are and gets the stored bytes.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator

from .server import Answer, HubDouble, Request, part_of, route

Term = tuple[str, int, int, int]  # xorb, unpacked bytes, first chunk, end chunk


def answer(double: HubDouble, request: Request) -> Answer:
    return route(ROUTES, double, request)


def put_object(double: HubDouble, request: Request, sha256: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != sha256:
        return Answer(400)
    double.objects[sha256] = request.body
    return Answer()


def get_object(double: HubDouble, request: Request, sha256: str, name: str) -> Answer:
    content = double.objects.get(sha256)
    return Answer(404) if content is None else part_of(content, request)


def put_xorb(double: HubDouble, request: Request, xorb: str) -> Answer:
    is_new = xorb not in double.xorbs
    double.xorbs[xorb] = request.body
    return Answer(body={"was_inserted": is_new})


def get_xorb(double: HubDouble, request: Request, xorb: str) -> Answer:
    return part_of(double.xorbs[xorb], request) if xorb in double.xorbs else Answer(404)


def put_shard(double: HubDouble, request: Request) -> Answer:
    for file, sha256, terms in _files_of_shard(request.body):
        double.shards[file] = terms
        if sha256 is not None:
            double.xet_of_sha256[sha256] = file
    return Answer(body={"result": 1})


def reconstruct(double: HubDouble, request: Request, file: str) -> Answer:
    """The runs of chunks that hold a range of a file, and where in the xorbs they are."""
    if file not in double.shards:
        return Answer(404)
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    size = sum(term[1] for term in double.shards[file])
    start, end = (int(found[1]), int(found[2] or size - 1) + 1) if found else (0, size)
    if start >= size:
        return Answer(416)
    terms, fetches, skipped, position = [], {}, 0, 0
    for xorb, length, first, last in double.shards[file]:
        if position < end and position + length > start:
            if not terms:
                skipped = start - position
            places = _places_of_chunks(double.xorbs[xorb])
            chunks = {"start": first, "end": last}
            terms.append({"hash": xorb, "unpacked_length": length, "range": chunks})
            where = {"start": places[first], "end": places[last] - 1}
            url = f"{double.cdn}/v1/xorbs/default/{xorb}"
            fetches.setdefault(xorb, []).append({"range": chunks, "url": url, "url_range": where})
        position += length
    return Answer(body={"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetches})


def _places_of_chunks(xorb: bytes) -> list[int]:
    """Where each chunk of a xorb starts, and where the last one ends."""
    places, position = [0], 0
    while position + 8 <= len(xorb) and xorb[position : position + 7] != b"XETBLOB":
        position += 8 + int.from_bytes(xorb[position + 1 : position + 4], "little")
        places.append(position)
    return places


def _files_of_shard(shard: bytes) -> Iterator[tuple[str, str | None, list[Term]]]:
    """Hash, sha256 and terms of each file in a shard, of which all records have 48 bytes."""
    records = [shard[start : start + 48] for start in range(48, len(shard) - 47, 48)]
    position = 0
    while position < len(records) and records[position][:32] != b"\xff" * 32:
        flags, count = struct.unpack("<II", records[position][32:40])
        file, position = _text_of_hash(records[position]), position + 1
        terms = []
        for record in records[position : position + count]:
            _, length, first, last = struct.unpack("<IIII", record[32:48])
            terms.append((_text_of_hash(record), length, first, last))
        position += count * (2 if flags & 1 << 31 else 1)  # each with a record of verification
        sha256 = None
        if flags & 1 << 30:
            sha256, position = _text_of_hash(records[position]), position + 1
        yield file, sha256, terms


def _text_of_hash(record: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", record[:32]))


HASH = "([0-9a-f]{64})"
ROUTES = [
    ("PUT", f"/objects/{HASH}", put_object),
    ("HEAD GET", f"/objects/{HASH}/(.+)", get_object),
    ("POST", f"/v1/xorbs/default/{HASH}", put_xorb),
    ("GET", f"/v1/xorbs/default/{HASH}", get_xorb),
    ("POST", "/v1/shards", put_shard),
    ("GET", f"/v1/reconstructions/{HASH}", reconstruct),
]
