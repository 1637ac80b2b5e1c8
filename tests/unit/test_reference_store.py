"""The reference store's layout on disk: entries of earlier versions are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiv.data.reference_store import ReferenceStore
from raydiv.data.tokens import content_keys
from raydiv.losses.position import PositionWeights, TokenConstraint

EXAMPLE = ([1, 2], [3, 4])
KEY = "2cc5e4d47c5f3c5fbe635a5a5b7bb3925befba158d899cc3c8f1ffe80670ea8b02000000"


@pytest.mark.parametrize(
    ("quantization", "folder"),
    [(None, "fa7cbd1d8809118b6450de8d6233e747"), ("nf4", "afb49de31ed9956eec2b80771d7d259e")],
)
def test_entries_written_by_the_first_release_are_found(
    quantization: str | None, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path))
    written = tmp_path / "reference" / folder
    written.mkdir(parents=True)
    pq.write_table(
        pa.table({"key": pa.array([bytes.fromhex(KEY)], pa.binary(36)), "logp": pa.array([-1.5], pa.float32())}),
        written / "part.parquet",
    )
    store = ReferenceStore("weights", "float32", quantization)
    np.testing.assert_array_equal(store.look_up(content_keys([EXAMPLE, ([1], [2])])), [np.float32(-1.5), np.nan])


def test_log_probs_of_tokens_are_kept_beside_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path))
    keys = content_keys([EXAMPLE, ([1], [2]), ([5], [6, 7, 8])])
    tokens = [np.array(values, np.float32) for values in ([-1, -2], [-3], [-4, -5, -6])]
    store = ReferenceStore("weights", "float32", None, TokenConstraint((0.5,)))
    store.add("first", keys[:2], [-3, -3], tokens[:2])
    lengths = np.array([len(values) for values in tokens])
    with pytest.raises(KeyError, match="1 examples"):
        store.look_up_tokens(keys, lengths)
    store.add("second", keys[2:], [-15], tokens[2:])
    # another beta has the same entries; weights and the plain log-probs have their own
    again = ReferenceStore("weights", "float32", None, TokenConstraint((2.0, 0.1)))
    np.testing.assert_array_equal(again.look_up(keys), np.array([-3, -3, -15], np.float32))
    order = [2, 0, 1, 0]
    found = again.look_up_tokens(keys.take(pa.array(order)), lengths[order])
    for values, row in zip(found.at(np.arange(4)), order, strict=True):
        np.testing.assert_array_equal(values, tokens[row])
    for position in (None, PositionWeights(rate=0.5)):
        assert np.isnan(ReferenceStore("weights", "float32", None, position).look_up(keys)).all()
