"""Item results and item keys as bytes: about six an item, read back exactly as stored."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentmerge.contracts.worker import ItemResult

#: Hex digits of an item key.
KEY_DIGITS = 16


def pack(results: Sequence[ItemResult]) -> bytes:
    """Item results as bytes: count, then length-prefixed zlib columns.

    Values are float64 (a metric is stored exactly), log-likelihoods float32 (what torch summed),
    margins float16 (three digits; they are clipped where they are used), flags one byte. Generated
    tokens, int32, are a fifth column only where some were counted: older versions read no further.
    What metrics of whole answers are made of is a sixth, as a JSON list of texts, and the answers
    and reasons that are kept a seventh.
    """
    missing = float("nan")
    said = any(r.answers or r.reasons for r in results)
    whole = said or any(r.whole for r in results)
    counted = whole or any(r.tokens is not None for r in results)

    def words(found: Any) -> bytes:
        return column("u1", np.frombuffer(json.dumps(found).encode(), "u1"))

    def column(kind: str, values: Any) -> bytes:
        body = zlib.compress(np.asarray(values, dtype=kind).tobytes(), 6)
        return len(body).to_bytes(4, "little") + body

    return len(results).to_bytes(4, "little") + b"".join(
        (
            column("<f8", [r.value for r in results]),
            column("<f4", [missing if r.log_likelihood is None else r.log_likelihood
                           for r in results]),
            column("<f2", [missing if r.margin is None else np.clip(r.margin, -6e4, 6e4)
                           for r in results]),
            column("u1", [r.truncated + 2 * r.cut_off + 4 * r.missing for r in results]),
            column("<i4", [-1 if r.tokens is None else r.tokens for r in results])
            if counted else b"",
            words([r.whole for r in results]) if whole else b"",
            words([[r.answers, r.reasons] if r.answers or r.reasons else 0 for r in results])
            if said else b"",
        )
    )  # fmt: skip


def unpack(block: bytes) -> list[ItemResult]:
    count = int.from_bytes(block[:4], "little")
    place, columns = 4, []
    for kind in ("<f8", "<f4", "<f2", "u1", "<i4"):
        if place == len(block):
            columns.append(np.full(count, -1))
            break
        size = int.from_bytes(block[place : place + 4], "little")
        raw = zlib.decompress(block[place + 4 : place + 4 + size])
        columns.append(np.frombuffer(raw, dtype=kind, count=count))
        place += 4 + size
    texts: list[list[Any]] = [[""] * count, [0] * count]
    for column in texts:
        if place < len(block):
            size = int.from_bytes(block[place : place + 4], "little")
            column[:] = json.loads(zlib.decompress(block[place + 4 : place + 4 + size]))
            place += 4 + size
    return [
        ItemResult(
            float(value),
            None if np.isnan(ll) else float(ll),
            None if np.isnan(margin) else float(margin),
            bool(flag & 1),
            bool(flag & 2),
            tokens=None if made < 0 else int(made),
            missing=bool(flag & 4),
            whole=text,
            answers=tuple(words[0]) if words else (),
            reasons=tuple(words[1]) if words else (),
        )
        for value, ll, margin, flag, made, text, words in zip(*columns, *texts, strict=True)
    ]


def pack_keys(keys: Sequence[str]) -> bytes:
    """Item keys (hex digits) as one compressed column."""
    return zlib.compress(bytes.fromhex("".join(keys)))


def unpack_keys(packed: bytes) -> list[str]:
    raw = zlib.decompress(packed).hex()
    return [raw[i : i + KEY_DIGITS] for i in range(0, len(raw), KEY_DIGITS)]
