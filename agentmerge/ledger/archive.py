"""The results database as a whole: how large it is, what nobody needs, and all of it as Parquet."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agentmerge.errors import UserError
from agentmerge.ledger import Ledger, unpack
from agentmerge.ledger.items import FORGOTTEN
from agentmerge.ledger.packing import unpack_keys
from agentmerge.system.temporary import replacing

#: Item rows written to Parquet at once: a hundred megabytes of memory at most.
BATCH_ROWS = 500_000

_UNUSED = "recipe_hash NOT IN (SELECT recipe_hash FROM candidates)"
_OF_A_RUN = (
    "run_items", "run_texts", "run_prompts", "run_limits", "run_recipes", "advice", "model_calls",
    "probes", "unjudged", "candidates",
)  # fmt: skip


def stats(ledger: Ledger) -> dict[str, Any]:
    """{path, bytes, free_bytes, searches, candidates, recipes, blocks, item_results,
    bytes_per_item, model_calls, unused: {blocks, item_results, bytes}}.

    bytes_per_item: of the packed blocks. unused: results that no search's candidate has.
    """
    page, pages, free = (
        int(ledger._rows(f"PRAGMA {name}")[0][0])
        for name in ("page_size", "page_count", "freelist_count")
    )
    blocks, items, size = _blocks(ledger, "1")
    unused = dict(zip(("blocks", "item_results", "bytes"), _blocks(ledger, _UNUSED), strict=True))
    return {
        "path": str(ledger.path),
        "bytes": page * pages,
        "free_bytes": page * free,
        "searches": _count(ledger, "runs"),
        "candidates": _count(ledger, "candidates"),
        "recipes": _count(ledger, "recipes"),
        "blocks": blocks,
        "item_results": items,
        "bytes_per_item": size / items if items else None,
        "model_calls": _count(ledger, "model_calls"),
        "unused": unused,
    }


def prune(
    ledger: Ledger, run_ids: Sequence[str], *, dry_run: bool, shrink: bool = True
) -> dict[str, Any]:
    """Forget these searches, and every result, recipe and item set that no search has any more.

    Branches hold a copy of their past, so forgetting the search they left harms none; what it
    searched stays known to them.

    shrink: rewrite the file without what is gone, while which nobody else can write to it.

    Returns: {blocks, item_results, freed_bytes}; bytes are of the blocks in a dry run.

    Raises:
        LedgerError: the database is locked, or the disk has no room to rewrite it.
    """
    marks = ", ".join("?" for _ in run_ids)
    gone = f"recipe_hash NOT IN (SELECT recipe_hash FROM candidates WHERE run_id NOT IN ({marks}))"
    blocks, items, size = _blocks(ledger, gone, *run_ids)
    found = {"blocks": blocks, "item_results": items, "freed_bytes": size, "dry_run": dry_run}
    if dry_run:
        return found
    before = ledger.path.stat().st_size
    heirs = _heirs(ledger, run_ids)
    with ledger._writing() as conn:
        conn.executemany(
            "INSERT OR IGNORE INTO run_items SELECT ?1, task, CASE part WHEN 'search' "
            "THEN ?3 || run_id ELSE part END, item_set_id FROM run_items "
            "WHERE run_id = ?2 AND (part = 'search' OR part LIKE ?3 || '%')",
            [(heir, gone, FORGOTTEN) for heir, gone in heirs],
        )
        _remove(conn, run_ids)
        for table in ("results", "gradients"):
            conn.execute(f"DELETE FROM {table} WHERE {_UNUSED}")
        conn.execute(
            "DELETE FROM recipes WHERE hash NOT IN (SELECT recipe_hash FROM candidates) "
            "AND hash NOT IN (SELECT recipe_hash FROM results)"
        )
        conn.execute(
            "DELETE FROM item_sets WHERE id NOT IN (SELECT item_set_id FROM results) "
            "AND id NOT IN (SELECT item_set_id FROM run_items)"
        )
    if shrink:
        ledger.shrink()
    return found | {"freed_bytes": max(0, before - ledger.path.stat().st_size)}


def _heirs(ledger: Ledger, run_ids: Sequence[str]) -> list[tuple[str, str]]:
    """(search that stays, forgotten one that it went on from)."""
    staying = {row.id for row in ledger.runs()}.difference(run_ids) if run_ids else set[str]()
    return [
        (heir, gone)
        for heir in sorted(staying)
        for gone in sorted(ledger.went_on_from([heir]).intersection(run_ids))
    ]


def remove_runs(ledger: Ledger, run_ids: Sequence[str]) -> None:
    """Forget these searches; items' results stay."""
    with ledger._writing() as conn:
        _remove(conn, run_ids)


def _remove(conn: sqlite3.Connection, run_ids: Sequence[str]) -> None:
    marks = ", ".join("?" for _ in run_ids)
    for table in _OF_A_RUN:
        conn.execute(f"DELETE FROM {table} WHERE run_id IN ({marks})", run_ids)
    conn.execute(f"DELETE FROM runs WHERE id IN ({marks})", run_ids)


def export_parquet(ledger: Ledger, folder: Path) -> dict[str, int]:
    """Write searches.parquet, candidates.parquet and items.parquet; returns rows by file.

    items has one row an item result: recipe_hash, engine, task, protocol, item, value,
    log_likelihood, margin, truncated, cut_off, tokens.

    Raises:
        UserError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        folder.mkdir(parents=True, exist_ok=True)
        counts = {}
        for name, sql in _TABLES.items():
            records = ledger.records(sql)
            if name == "searches":  # as the ledger reads them: without secrets
                configs = {row.id: row.config for row in ledger.runs()}
                records = [record | {"config": configs[record["id"]]} for record in records]
            table = pa.Table.from_pylist(records)
            with replacing(folder / f"{name}.parquet") as draft:
                pq.write_table(table, draft, compression="zstd")
            counts[name] = table.num_rows
        counts["items"] = 0
        kinds = {"value": pa.float64(), "log_likelihood": pa.float32(), "margin": pa.float32()}
        kinds |= {"truncated": pa.bool_(), "cut_off": pa.bool_(), "tokens": pa.int32()}
        schema = pa.schema(
            [(name, kinds.get(name, pa.dictionary(pa.int32(), pa.string()))) for name in _ITEM]
        )
        with (
            replacing(folder / "items.parquet") as draft,
            pq.ParquetWriter(draft, schema, compression="zstd") as writer,
        ):
            for columns in _item_batches(ledger):
                batch = pa.Table.from_pydict(columns, schema=schema)
                writer.write_table(batch)
                counts["items"] += batch.num_rows
    except OSError as error:
        raise UserError(f"--to {folder} cannot be written: {error.strerror or error}") from None
    return counts


_ITEM = (
    "recipe_hash", "engine", "task", "protocol", "item",
    "value", "log_likelihood", "margin", "truncated", "cut_off", "tokens",
)  # fmt: skip

_TABLES = {
    "searches": (
        "SELECT name, id, created, status, stop_reason, algorithm, seed, parent_run, "
        "parent_generation, config, result FROM runs ORDER BY created, id"
    ),
    "candidates": (
        "SELECT r.name AS search, c.generation, c.slot, c.operator, c.label, c.recipe_hash, "
        "c.state, c.score, c.tasks, c.failure, c.reused, c.truncated, c.cut_off, c.seconds, "
        "c.tokens, c.fingerprint, c.prior, c.vector "
        "FROM candidates c JOIN runs r ON r.id = c.run_id "
        "ORDER BY r.created, r.id, c.generation, c.slot"
    ),
}


def _item_batches(ledger: Ledger) -> Iterator[dict[str, list[Any]]]:
    """Columns of item results, ``BATCH_ROWS`` rows or a little more at a time."""
    engines = {key: json.loads(info) for key, info in ledger._rows("SELECT id, info FROM engines")}
    names = {key: f"{info['engine']} {info['version']}" for key, info in engines.items()}
    sets: dict[int, list[str]] = {}
    columns: dict[str, list[Any]] = {name: [] for name in _ITEM}
    last = 0
    while rows := ledger._rows(
        "SELECT r.id, r.recipe_hash, r.engine_id, p.task, p.hash, r.item_set_id, r.block "
        "FROM results r JOIN protocols p ON p.id = r.protocol_id WHERE r.id > ? "
        "ORDER BY r.id LIMIT 100",
        last,
    ):
        for last, recipe, engine, task, protocol, item_set, block in rows:  # noqa: B007
            if item_set not in sets:
                packed = ledger._rows("SELECT keys FROM item_sets WHERE id = ?", item_set)[0][0]
                sets[item_set] = unpack_keys(packed)
            results = unpack(block)
            for name, value in zip(_ITEM, (recipe, names[engine], task, protocol), strict=False):
                columns[name] += [value] * len(results)
            columns["item"] += sets[item_set]
            for name in _ITEM[5:]:
                columns[name] += [getattr(result, name) for result in results]
        if len(columns["item"]) >= BATCH_ROWS:
            yield columns
            columns = {name: [] for name in _ITEM}
    if columns["item"]:
        yield columns


def _count(ledger: Ledger, table: str) -> int:
    return int(ledger._rows(f"SELECT count(*) FROM {table}")[0][0])


def _blocks(ledger: Ledger, where: str, *values: Any) -> tuple[int, int, int]:
    """(blocks, item results, bytes) of the results that match."""
    row = ledger._rows(
        "SELECT count(*), coalesce(sum(s.count), 0), coalesce(sum(length(r.block)), 0) "
        f"FROM results r JOIN item_sets s ON s.id = r.item_set_id WHERE {where}",
        *values,
    )[0]
    return int(row[0]), int(row[1]), int(row[2])
