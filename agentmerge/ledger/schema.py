"""The tables of the results database, as a list of small migrations. Only ever append to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from agentmerge.errors import UserError

#: Our migrations among those of others in one file.
SET = "agentmerge"

#: Every migration, in order; what each is called is what the database remembers of it.
MIGRATIONS: list[Callable[[Any], None]] = []


def migration(step: Callable[[Any], None]) -> Callable[[Any], None]:
    """Append a step. It gets a ``sqlite_utils.Database`` inside a transaction."""
    MIGRATIONS.append(step)
    return step


def pending(conn: sqlite3.Connection) -> bool:
    """Whether a database lacks a migration. Reads only, and without importing sqlite_utils.

    Raises:
        UserError: it has one that is not known here.
    """
    ours = {step.__name__ for step in MIGRATIONS}
    try:
        rows = conn.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = ?", (SET,))
        theirs = {str(row[0]) for row in rows}
        if newer := sorted(theirs - ours):
            raise UserError(
                f"a newer agentmerge wrote this results database (its tables have {newer[-1]}, and "
                "this version does not know what that means); update agentmerge, or name another "
                "folder with --runs-dir"
            )
        return bool(ours - theirs)
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return True


def migrate(conn: sqlite3.Connection) -> None:
    """Apply what is pending; call it inside a transaction."""
    from sqlite_utils import Database, Migrations

    migrations = Migrations(SET)
    for step in MIGRATIONS:
        migrations()(step)
    migrations.apply(Database(conn, recursive_triggers=False))


@migration
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


@migration
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


@migration
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


@migration
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


@migration
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


@migration
def m006_views_for_people(db: Any) -> None:
    """What a reader with a general tool (Datasette, sqlite3) looks for; nothing here reads them."""
    _run(
        db,
        """
        CREATE VIEW searches AS
            SELECT r.name, r.status, r.algorithm, r.seed, datetime(r.created, 'unixepoch') AS began,
                p.name AS branched_from, r.parent_generation AS at_generation,
                (SELECT count(*) FROM candidates c WHERE c.run_id = r.id AND c.prior = 0
                    AND c.twin_slot IS NULL AND c.state IN ('scored', 'failed')) AS evaluations,
                (SELECT max(score) FROM candidates c WHERE c.run_id = r.id AND c.prior = 0
                    AND c.twin_slot IS NULL) AS best,
                json_extract(r.result, '$.answer.sealed_score') AS sealed,
                json_extract(r.result, '$.verdict') AS verdict
            FROM runs r LEFT JOIN runs p ON p.id = r.parent_run;
        CREATE VIEW scores AS
            SELECT r.name AS search, c.generation, c.slot, c.operator, c.label, c.state, c.score,
                c.tasks, c.failure, c.seconds, c.truncated, c.cut_off,
                c.recipe_hash, m.yaml AS recipe
            FROM candidates c JOIN runs r ON r.id = c.run_id
            LEFT JOIN recipes m ON m.hash = c.recipe_hash
        """,
    )


@migration
def m007_candidates_that_lost_a_race(db: Any) -> None:
    """A loser is not scored: it has an estimate from the rung that it reached."""
    _run(
        db,
        """
        ALTER TABLE candidates ADD COLUMN estimate REAL;
        ALTER TABLE candidates ADD COLUMN rung REAL NOT NULL DEFAULT 1;
        ALTER TABLE candidates ADD COLUMN share REAL NOT NULL DEFAULT 1
        """,
    )


@migration
def m008_constraints(db: Any) -> None:
    """What a candidate lacks to the tasks' floors; 0 where the search has none."""
    _run(db, "ALTER TABLE candidates ADD COLUMN violation REAL NOT NULL DEFAULT 0")


@migration
def m009_limits_of_a_run(db: Any) -> None:
    """From which point of a search on which limits held: they may be raised on resume."""
    _run(
        db,
        """
        CREATE TABLE run_limits (
            run_id TEXT NOT NULL REFERENCES runs(id), number INTEGER NOT NULL,
            candidates INTEGER NOT NULL, words INTEGER NOT NULL, limits TEXT NOT NULL,
            PRIMARY KEY (run_id, number)
        ) WITHOUT ROWID
        """,
    )


@migration
def m010_search_spaces(db: Any) -> None:
    """Which search space a candidate's vector lies in; "" is the config's own."""
    _run(db, "ALTER TABLE candidates ADD COLUMN space TEXT NOT NULL DEFAULT ''")


@migration
def m011_recipes_by_a_runs_own_names(db: Any) -> None:
    """A merge is the same under other names of the same parents; each search keeps its own."""
    _run(
        db,
        """
        CREATE TABLE run_recipes (
            run_id TEXT NOT NULL REFERENCES runs(id), hash TEXT NOT NULL, yaml TEXT NOT NULL,
            PRIMARY KEY (run_id, hash)
        ) WITHOUT ROWID;
        DROP VIEW scores;
        CREATE VIEW scores AS
            SELECT r.name AS search, c.generation, c.slot, c.operator, c.label, c.state, c.score,
                c.tasks, c.failure, c.seconds, c.truncated, c.cut_off,
                c.recipe_hash, coalesce(o.yaml, m.yaml) AS recipe
            FROM candidates c JOIN runs r ON r.id = c.run_id
            LEFT JOIN recipes m ON m.hash = c.recipe_hash
            LEFT JOIN run_recipes o ON o.run_id = c.run_id AND o.hash = c.recipe_hash
        """,
    )


@migration
def m012_whose_probe(db: Any) -> None:
    """The generation that a tool call was made in; -1: in none, or before this was kept."""
    _run(db, "ALTER TABLE probes ADD COLUMN generation INTEGER NOT NULL DEFAULT -1")


@migration
def m013_what_was_told(db: Any) -> None:
    """What a user needs to hear once about a database, not at the start of every search."""
    _run(db, "CREATE TABLE told (what TEXT PRIMARY KEY) WITHOUT ROWID")


@migration
def m014_generated_tokens(db: Any) -> None:
    """What a candidate's answers took, in tokens an item; NULL where nobody counted."""
    _run(db, "ALTER TABLE candidates ADD COLUMN tokens REAL")


@migration
def m015_verdicts(db: Any) -> None:
    """What judges said, under all that they were shown: nonce 0 counts, 1 is for their noise."""
    _run(
        db,
        """
        CREATE TABLE verdicts (
            question TEXT NOT NULL, nonce INTEGER NOT NULL, judge TEXT NOT NULL,
            task TEXT NOT NULL, item TEXT NOT NULL, turn INTEGER NOT NULL, value REAL NOT NULL,
            reason TEXT NOT NULL, run_id TEXT NOT NULL, created REAL NOT NULL,
            PRIMARY KEY (question, nonce)
        ) WITHOUT ROWID;
        CREATE INDEX verdicts_twice ON verdicts(judge, nonce)
        """,
    )


@migration
def m016_what_items_say(db: Any) -> None:
    """What a search's items ask and what is right, for people to read; nothing of sealed ones."""
    _run(
        db,
        """
        CREATE TABLE run_texts (
            run_id TEXT NOT NULL REFERENCES runs(id), task TEXT NOT NULL, block BLOB NOT NULL,
            PRIMARY KEY (run_id, task)
        ) WITHOUT ROWID
        """,
    )


@migration
def m017_unjudged(db: Any) -> None:
    """Which questions of a search no judge gave a valid verdict to, and why. final: whether it was
    the question or the replies to it, so that nothing is gained by asking it again. Of searches
    from before, requests alone are known, and not their tasks."""
    _run(
        db,
        """
        CREATE TABLE unjudged (
            run_id TEXT NOT NULL REFERENCES runs(id),
            question TEXT NOT NULL, nonce INTEGER NOT NULL, task TEXT NOT NULL,
            item TEXT NOT NULL, turn INTEGER NOT NULL, reason TEXT NOT NULL,
            final INTEGER NOT NULL, created REAL NOT NULL,
            PRIMARY KEY (run_id, question, nonce)
        ) WITHOUT ROWID;
        INSERT INTO unjudged SELECT
            run_id, substr(prompt_hash, 1, instr(prompt_hash, '/') - 1),
            CAST(substr(prompt_hash, instr(prompt_hash, '/') + 1) AS INTEGER), '', '', 0,
            'an earlier version did not keep why', sum(ending = 'refused' AND last <= 2) = 2,
            max(created)
        FROM (
            SELECT *, sum(ending IN ('answered', 'refused', 'failed')) OVER (
                PARTITION BY run_id, prompt_hash ORDER BY attempt DESC
            ) AS last FROM model_calls WHERE role = 'judge' AND generation = -1
        )
        GROUP BY run_id, prompt_hash HAVING sum(ending = 'answered') = 0
        """,
    )


def _run(db: Any, statements: str) -> None:
    for statement in statements.split(";"):
        if statement.strip():
            db.execute(statement)
