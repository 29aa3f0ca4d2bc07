"""The tables of a store, and how a file is recognised as one."""

APPLICATION = 0x4B45454C  # "KEEL", in the header of the file
VERSION = 1

# A rollout's numbers stand last: pages that list rollouts never touch them. NULL in metrics.value is NaN, which SQLite
# cannot hold. Metrics are clustered by (run, name, step), so that one curve is one range.
TABLES = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    recipe TEXT NOT NULL,
    task TEXT NOT NULL,
    model TEXT NOT NULL,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL,
    step INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    finished REAL,
    summary TEXT NOT NULL DEFAULT '{}',
    config TEXT NOT NULL
);
CREATE TABLE names (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);
CREATE TABLE metrics (
    run INTEGER NOT NULL REFERENCES runs (id),
    name INTEGER NOT NULL REFERENCES names (id),
    step INTEGER NOT NULL,
    value REAL,
    PRIMARY KEY (run, name, step)
) WITHOUT ROWID;
CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES runs (id),
    step INTEGER NOT NULL,
    data_index INTEGER NOT NULL,
    group_index INTEGER NOT NULL,
    reward REAL,
    stop TEXT NOT NULL,
    length INTEGER NOT NULL,
    rewards TEXT NOT NULL,
    answer TEXT,
    prompt TEXT NOT NULL,
    completion TEXT NOT NULL,
    tokens TEXT,
    numbers BLOB
);
CREATE INDEX rollouts_by_step ON rollouts (run, step, id);
CREATE TABLE evaluations (
    run INTEGER NOT NULL REFERENCES runs (id),
    step INTEGER NOT NULL,
    phase TEXT NOT NULL,
    created REAL NOT NULL,
    evaluation TEXT NOT NULL,
    PRIMARY KEY (run, step, phase)
);
"""
