"""Batches kept in memory are those that are decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import make_images
from tests.support_models import SMALL
from tldist.data.keep import KeptBatches
from tldist.data.loader import load_batches
from tldist.domain import Domain, open_domain
from tldist.errors import DomainError

PLANS = [np.array([0, 3, 5]), np.array([1, 2]), np.array([4])]


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    make_images(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "0.png").write_bytes(b"broken")
    return open_domain(tmp_path)


def test_kept__are_decoded_once_and_equal_the_loader(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptBatches(domain, SMALL)
    expected = list(load_batches(domain, PLANS, SMALL, classes=("b", "x", "a")))
    reads: list[int] = []
    original = Domain.read
    monkeypatch.setattr(Domain, "read", lambda self, index: (reads.append(index), original(self, index))[1])
    for _ in range(3):
        for batch, other in zip(kept.labelled(("b", "x", "a"))(PLANS), expected, strict=True):
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.labels, other.labels)
            assert torch.equal(batch.valid, other.valid)
            assert batch.broken == other.broken
    assert sorted(reads) == list(range(6))


def test_kept__more_than_fits_is_decoded_anew(domain: Domain) -> None:
    kept = KeptBatches(domain, SMALL, most_bytes=2 * SMALL.height * SMALL.width * 3)
    first, second = list(kept(PLANS[:1])), list(kept(PLANS[1:2]))
    assert kept(PLANS[1:2]) is kept(PLANS[1:2])
    assert kept(PLANS[:1]) is not kept(PLANS[:1])
    assert (len(first[0].images), len(second[0].images)) == (3, 2)


def test_kept__an_unknown_class_is_named(domain: Domain) -> None:
    with pytest.raises(DomainError, match="unknown to the model: b"):
        KeptBatches(domain, SMALL).labelled(("a",))
