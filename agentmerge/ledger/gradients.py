"""Gradients: one compressed block per (recipe, engine, question), every number exactly."""

from __future__ import annotations

import json
import sqlite3
import time
import zlib

from agentmerge.contracts.worker import Gradient, TensorSlope
from agentmerge.ledger.rows import GradientKey
from agentmerge.ledger.store import Store, engine_text, hashed, intern


class GradientRows(Store):
    def gradient(self, key: GradientKey) -> Gradient | None:
        """The gradient kept under ``key``, its models by the names it was kept under."""
        rows = self._rows(
            "SELECT g.block FROM gradients g JOIN engines e ON e.id = g.engine_id "
            "WHERE g.recipe_hash = ? AND e.hash = ? AND g.question = ?",
            key.recipe_hash,
            hashed(engine_text(key.engine)),
            key.question,
        )
        return unpack_gradient(rows[0][0]) if rows else None


def insert_gradient(
    conn: sqlite3.Connection, key: GradientKey, gradient: Gradient, seconds: float
) -> None:
    engine = engine_text(key.engine)
    engine_id = intern(conn, "engines", hashed(engine), {"info": engine})
    conn.execute(
        "INSERT OR IGNORE INTO gradients (recipe_hash, engine_id, question, block, seconds, "
        "created) VALUES (?, ?, ?, ?, ?, ?)",
        (key.recipe_hash, engine_id, key.question, pack_gradient(gradient), seconds, time.time()),
    )


def pack_gradient(gradient: Gradient) -> bytes:
    tensors = [(t.tensor, t.layer, t.after, t.weights, t.scale) for t in gradient.tensors]
    return zlib.compress(json.dumps([gradient.loss, gradient.items, tensors]).encode(), 6)


def unpack_gradient(block: bytes) -> Gradient:
    loss, items, tensors = json.loads(zlib.decompress(block))
    return Gradient(
        loss,
        items,
        tuple(
            TensorSlope(tensor, layer, after, tuple(map(tuple, weights)), scale)
            for tensor, layer, after, weights, scale in tensors
        ),
    )
