"""The tables of a store, and how a file is recognised as one."""

APPLICATION = 0x4B45454C  # "KEEL", in the header of the file
VERSION = 1

# Indices and the table of SEARCH came later than the tables, and change none of them: an older Keel reads and writes
# a store that has them (triggers keep the search up to date), a newer one a store that lacks them. So they count for
# no version; what wants them looks whether they are there.
#
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
CREATE INDEX runs_listed ON runs (created, id, name, recipe, task, model, seed, status);
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
CREATE INDEX rollouts_listed ON rollouts (run, step, id, group_index, reward, stop, length);
CREATE TABLE evaluations (
    run INTEGER NOT NULL REFERENCES runs (id),
    step INTEGER NOT NULL,
    phase TEXT NOT NULL,
    created REAL NOT NULL,
    evaluation TEXT NOT NULL,
    PRIMARY KEY (run, step, phase)
);
"""

# Three neighbouring characters each, without their places: half the size, and what is found is compared once more.
SEARCH = (
    "CREATE VIRTUAL TABLE completions USING fts5 (completion, content = 'rollouts', content_rowid = 'id', "
    "tokenize = 'trigram', detail = 'none')",
    "CREATE TRIGGER completion_added AFTER INSERT ON rollouts BEGIN "
    "INSERT INTO completions (rowid, completion) VALUES (new.id, new.completion); END",
    "CREATE TRIGGER completion_removed AFTER DELETE ON rollouts BEGIN "
    "INSERT INTO completions (completions, rowid, completion) VALUES ('delete', old.id, old.completion); END",
)
