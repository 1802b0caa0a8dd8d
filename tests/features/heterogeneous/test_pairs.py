"""Files of pairs, and the words where they are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tldist.errors import DomainError
from tldist.features.heterogeneous.pairs import Pairs, match_pairs, match_same_ids, read_pairs, rows_of_pairs

PAIRS = [("a.png", "x/1"), ("b,c.png", "x/2"), ("ü.png", "x/3")]


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_read_pairs__csv_and_parquet_hold_the_same(tmp_path: Path) -> None:
    text = 'note,source,target\nfirst,a.png,x/1\n,"b,c.png",x/2\n,ü.png,x/3\n'
    assert read_pairs(write_csv(tmp_path / "pairs.csv", text)) == PAIRS
    assert read_pairs(write_csv(tmp_path / "bom.csv", "\ufeff" + text)) == PAIRS
    source, target = zip(*PAIRS)
    pq.write_table(pa.table({"target": target, "other": [1, 2, 3], "source": source}), tmp_path / "p.parquet")
    assert read_pairs(tmp_path / "p.parquet") == PAIRS
    pq.write_table(pa.table({"source": [1, 2], "target": [3, 4]}), tmp_path / "numbers.parquet")
    assert read_pairs(tmp_path / "numbers.parquet") == [("1", "3"), ("2", "4")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "its columns are a, b; expected source and target"),
        ("", r"its columns are \(none\)"),
        ("source,target\n", "no pairs in it"),
        ("source,target\na,x\nb,\n", "pair 2 has no target id"),
        ("source,target\na,x\nb\n", "pair 2 has no target id"),
        ("source,target\na,x,y\n", "more cells than the first line has names"),
        ("source,target\na,x\nb,y\na,z\n", "source id 'a' occurs twice, in the pairs 1 and 3"),
        ("source,target\na,x\nb,x\n", "target id 'x' occurs twice, in the pairs 1 and 2"),
        ('source,target\n"a,x\n', "cannot be read as CSV"),
    ],
)
def test_read_pairs__refuses(tmp_path: Path, text: str, words: str) -> None:
    path = write_csv(tmp_path / "pairs.csv", text)
    with pytest.raises(DomainError, match=words) as caught:
        read_pairs(path)
    assert str(path) in str(caught.value)


def test_read_pairs__refuses_what_is_not_there_or_not_parquet(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="no such file"):
        read_pairs(tmp_path / "none.csv")
    with pytest.raises(DomainError, match="cannot be read as Parquet"):
        read_pairs(write_csv(tmp_path / "no.parquet", "source,target\na,x\n"))
    pq.write_table(pa.table({"source": ["a", None], "target": ["x", "y"]}), tmp_path / "null.parquet")
    with pytest.raises(DomainError, match="pair 2 has no source id"):
        read_pairs(tmp_path / "null.parquet")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DomainError, match="its columns are id"):
        read_pairs(tmp_path / "other.parquet")


def test_match_pairs__gives_positions_in_the_order_of_the_file() -> None:
    found = match_pairs([("b", "x"), ("a", "z")], ["a", "b", "c"], ["x", "y", "z"])
    assert found.source.tolist() == [1, 0]
    assert found.target.tolist() == [0, 2]
    assert len(found) == 2


def test_match_pairs__names_an_unknown_id_its_domain_and_close_ones() -> None:
    with pytest.raises(
        DomainError, match=r"f.csv: 2 of 3 target ids are not in the target .* 'img_9'. Did .*img_1"
    ):
        match_pairs([("a", "img_1"), ("a", "img_9"), ("a", "no")], ["a"], ["img_1", "img_2"], "f.csv")
    with pytest.raises(DomainError, match="1 of 1 source ids are not in the source domain"):
        match_pairs([("q", "x")], ["a"], ["x"])


def test_match_same_ids__in_the_order_of_the_source() -> None:
    found = match_same_ids(["c", "a", "q"], ["a", "b", "c"])
    assert (found.source.tolist(), found.target.tolist()) == ([0, 1], [2, 0])
    with pytest.raises(DomainError, match=r"no id is in both domains \(the first ones: 'a' and 'b'\)"):
        match_same_ids(["a"], ["b"])


def test_rows_of_pairs__broken_images_are_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = Pairs(np.array([4, 0, 2]), np.array([1, 3, 5]))
    found = rows_of_pairs(pairs, np.array([0, 2, 4]), np.array([3, 1]))
    assert (found.source.tolist(), found.target.tolist()) == ([2, 0], [1, 0])
    assert "1 of 3 pairs are left out" in capsys.readouterr().err
    with pytest.raises(DomainError, match="none of the 3 pairs"):
        rows_of_pairs(pairs, np.array([1]), np.array([1]))
