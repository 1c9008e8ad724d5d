"""The tables of the results database, as a list of small migrations. Only ever append to it."""

from __future__ import annotations

from typing import Any

from sqlite_utils import Migrations

migrations = Migrations("agentmerge")


@migrations()  # type: ignore[untyped-decorator]
def m001_first(db: Any) -> None:
    _run(db, _SCHEMA)


_SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created REAL NOT NULL, status TEXT NOT NULL,
    stop_reason TEXT NOT NULL DEFAULT '', config TEXT NOT NULL, settings_hash TEXT NOT NULL,
    seed INTEGER NOT NULL, algorithm TEXT NOT NULL, parent_run TEXT, parent_generation INTEGER,
    facts TEXT NOT NULL DEFAULT '{}', result TEXT
);
CREATE TABLE recipes (hash TEXT PRIMARY KEY, yaml TEXT NOT NULL);
CREATE TABLE candidates (
    run_id TEXT NOT NULL REFERENCES runs(id), generation INTEGER NOT NULL, slot INTEGER NOT NULL,
    operator TEXT NOT NULL, label TEXT NOT NULL, vector TEXT, recipe_hash TEXT NOT NULL,
    twin_generation INTEGER, twin_slot INTEGER, state TEXT NOT NULL, score REAL, tasks TEXT,
    failure TEXT, reused INTEGER NOT NULL DEFAULT 0, truncated INTEGER NOT NULL DEFAULT 0,
    cut_off INTEGER NOT NULL DEFAULT 0, seconds REAL, fingerprint TEXT,
    prior INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run_id, generation, slot)
) WITHOUT ROWID;
CREATE INDEX candidates_recipe ON candidates(run_id, recipe_hash);
CREATE TABLE engines (id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, info TEXT NOT NULL);
CREATE TABLE protocols (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, task TEXT NOT NULL, info TEXT NOT NULL
);
CREATE TABLE item_sets (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, count INTEGER NOT NULL, keys BLOB NOT NULL
);
CREATE TABLE results (
    id INTEGER PRIMARY KEY, recipe_hash TEXT NOT NULL, engine_id INTEGER NOT NULL,
    protocol_id INTEGER NOT NULL, item_set_id INTEGER NOT NULL, block BLOB NOT NULL,
    fingerprint TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL,
    UNIQUE (recipe_hash, engine_id, protocol_id, item_set_id)
);
CREATE TABLE model_calls (
    run_id TEXT NOT NULL, generation INTEGER NOT NULL, role TEXT NOT NULL,
    prompt_hash TEXT NOT NULL, attempt INTEGER NOT NULL, model TEXT NOT NULL,
    messages TEXT NOT NULL, reply TEXT, error TEXT,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL,
    latency_s REAL NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (run_id, generation, role, prompt_hash, attempt)
) WITHOUT ROWID;
CREATE TABLE advice (
    run_id TEXT NOT NULL, generation INTEGER NOT NULL, role TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (run_id, generation, role)
) WITHOUT ROWID
"""


@migrations()  # type: ignore[untyped-decorator]
def m002_items_of_a_run(db: Any) -> None:
    """Which items a search asked, so that two searches can be compared without their tasks."""
    _run(
        db,
        """
        CREATE TABLE run_items (
            run_id TEXT NOT NULL REFERENCES runs(id), task TEXT NOT NULL, part TEXT NOT NULL,
            item_set_id INTEGER NOT NULL REFERENCES item_sets(id),
            PRIMARY KEY (run_id, task, part)
        ) WITHOUT ROWID;
        CREATE INDEX candidates_score ON candidates(run_id, score)
        """,
    )


@migrations()  # type: ignore[untyped-decorator]
def m003_gradients(db: Any) -> None:
    _run(
        db,
        """
        ALTER TABLE candidates ADD COLUMN want TEXT NOT NULL DEFAULT 'score';
        ALTER TABLE candidates ADD COLUMN loss_kind TEXT;
        ALTER TABLE candidates ADD COLUMN loss REAL;
        ALTER TABLE candidates ADD COLUMN gradient TEXT;
        CREATE TABLE gradients (
            id INTEGER PRIMARY KEY, recipe_hash TEXT NOT NULL, engine_id INTEGER NOT NULL,
            question TEXT NOT NULL, block BLOB NOT NULL, seconds REAL NOT NULL,
            created REAL NOT NULL, UNIQUE (recipe_hash, engine_id, question)
        )
        """,
    )


@migrations()  # type: ignore[untyped-decorator]
def m004_each_request(db: Any) -> None:
    """A row a request, with what it was for and what it cost; and the agents' tool calls."""
    _run(
        db,
        """
        ALTER TABLE model_calls ADD COLUMN ending TEXT NOT NULL DEFAULT 'answered';
        ALTER TABLE model_calls ADD COLUMN shape TEXT NOT NULL DEFAULT 'text';
        ALTER TABLE model_calls ADD COLUMN tool_calls TEXT NOT NULL DEFAULT '[]';
        ALTER TABLE model_calls ADD COLUMN cost_usd REAL;
        ALTER TABLE model_calls ADD COLUMN prompt_file TEXT NOT NULL DEFAULT '';
        UPDATE model_calls SET ending = 'failed' WHERE reply IS NULL;
        CREATE TABLE probes (
            run_id TEXT NOT NULL, tool TEXT NOT NULL, arguments TEXT NOT NULL,
            answer TEXT NOT NULL, items INTEGER NOT NULL, created REAL NOT NULL,
            PRIMARY KEY (run_id, tool, arguments)
        ) WITHOUT ROWID
        """,
    )


@migrations()  # type: ignore[untyped-decorator]
def m005_prompts_of_a_run(db: Any) -> None:
    """What the advised roles of a search were told, so that two searches can be compared."""
    _run(
        db,
        """
        CREATE TABLE run_prompts (
            run_id TEXT NOT NULL REFERENCES runs(id), role TEXT NOT NULL, text TEXT NOT NULL,
            PRIMARY KEY (run_id, role)
        ) WITHOUT ROWID
        """,
    )


def _run(db: Any, statements: str) -> None:
    for statement in statements.split(";"):
        if statement.strip():
            db.execute(statement)
