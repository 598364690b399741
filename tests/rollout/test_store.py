"""Groups read back equal to what was written, whatever is in them."""

from __future__ import annotations

import dataclasses
import datetime
import math

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.store import Store, StoreError
from rollout.types import Document, FinishReason, Group, Position, Prompt, Thought

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
LOGPS = st.floats(allow_nan=False, width=64)


@st.composite
def thoughts(draw):
    ids = draw(IDS)
    logps = tuple(draw(st.lists(LOGPS, min_size=len(ids), max_size=len(ids))))
    span = draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
    version, seed = draw(st.integers(0, 2**40)), draw(st.integers(0, 2**63 - 1))
    return Thought(ids, logps, draw(st.sampled_from(FinishReason)), version, seed, span)


@st.composite
def groups(draw):
    said = tuple(draw(st.lists(thoughts(), max_size=3)))
    rewards = draw(st.none() | st.just(tuple(draw(LOGPS) for _ in said)))
    position = Position(
        draw(st.text(max_size=5)), draw(st.integers(0, 2**40)), draw(IDS), draw(IDS), draw(IDS)
    )
    prompt = Prompt(
        draw(IDS), draw(IDS), draw(IDS), draw(IDS), tuple(draw(st.lists(st.text(max_size=3), max_size=2)))
    )
    extra = draw(
        st.dictionaries(
            st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers())
        )
    )
    parent, role = draw(st.none() | st.text(max_size=3)), draw(st.sampled_from(["policy", "generator"]))
    return Group(
        draw(st.text(max_size=5)),
        position,
        prompt,
        said,
        draw(st.integers(0, 99)),
        parent,
        role,
        rewards,
        extra,
    )


MOMENTS = (
    st.datetimes() | st.dates() | st.times() | st.timedeltas() | st.datetimes(timezones=st.just(datetime.UTC))
)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.binary(max_size=3)
)
CELLS = st.recursive(
    VALUES | MOMENTS | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)
DOCUMENTS = st.builds(
    Document,
    st.text(max_size=4),
    IDS,
    st.text(max_size=4),
    st.none() | st.dictionaries(st.text(max_size=3), CELLS, max_size=3),
    st.none() | st.integers(0, 9),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(groups(), max_size=3), st.lists(DOCUMENTS, max_size=3))
def test_read_is_what_was_written(tmp_path_factory, found, documents):
    store = Store(tmp_path_factory.mktemp("store"))
    store.write(3, found, documents, {"engine": "hf", "shares_weights": True})
    assert store.read(3) == (found, documents, {"engine": "hf", "shares_weights": True})
    assert store.steps() == [3]


GROUP = Group(
    "g",
    Position("d", 2, (1, 2), (3,)),
    Prompt((1, 2, 9), (8,)),
    (Thought((5, 8), (-0.1, -0.2), FinishReason.CLOSE, 0, 7),),
    0,
    rewards=(math.nan,),
)


def test_a_reward_that_does_not_apply_stays_nan(tmp_path):
    Store(tmp_path).write(1, [GROUP], [], {})
    ((group,), _, _) = Store(tmp_path).read(1)
    assert math.isnan(group.rewards[0]) and dataclasses.replace(group, rewards=None) == dataclasses.replace(
        GROUP, rewards=None
    )


def test_ranks_and_steps_are_kept_apart(tmp_path):
    for rank in (0, 1):
        for step in (1, 2):
            Store(tmp_path, rank).write(
                step, [dataclasses.replace(GROUP, id=f"{rank}.{step}")], [Document("d", (1, 2, 3))], {}
            )
    assert Store(tmp_path, 1).steps() == [1, 2] and Store(tmp_path, 1).read(2)[0][0].id == "1.2"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(
        StoreError, match=r"no rollouts of rank 0 in .* \(none\): write them with save_rollouts"
    ):
        Store(tmp_path).read(1)
    Store(tmp_path).write(1, [GROUP], [], {})
    with pytest.raises(StoreError, match=r"no rollouts of step 2 .*: it holds 1 steps, 1 to 1"):
        Store(tmp_path).read(2)
    with pytest.raises(StoreError, match=r"no rollouts of rank 3 in .* \(those of rank 0 only\)"):
        Store(tmp_path, 3).read(1)


def test_a_half_written_step_is_not_there(tmp_path):
    store = Store(tmp_path)
    store.write(1, [GROUP], [], {})
    store.write(2, [GROUP], [], {})
    store._path(2, "groups").unlink()
    assert store.steps() == [1]


def test_a_broken_or_foreign_file_is_named(tmp_path):
    store = Store(tmp_path)
    store.write(1, [GROUP], [], {})
    path = store._path(1, "groups")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"schema_version": "99"}), path)
    with pytest.raises(StoreError, match="has schema version 99, this is 1"):
        store.read(1)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(StoreError, match="is not a readable parquet file"):
        store.read(1)


def test_a_store_of_before_meta_and_answers_still_loads(tmp_path):
    """Issue 15.4: the two columns are new; files without them are read."""
    store = Store(tmp_path)
    store.write(1, [GROUP], [Document("d", (1, 2, 3), "d.txt:1", {"depth": 3}, 2)], {})
    path = store._path(1, "documents")
    pq.write_table(pq.read_table(path).drop_columns(["meta", "answer_at"]), path)
    with pytest.warns(UserWarning, match="before documents kept where their answers begin"):
        assert store.read(1)[1] == [Document("d", (1, 2, 3), "d.txt:1")]


def test_a_value_that_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"document d \(d.txt:1\): its meta holds a object.*meta_columns"):
        Store(tmp_path).write(1, [GROUP], [Document("d", (1,), "d.txt:1", {"picture": object()})], {})
