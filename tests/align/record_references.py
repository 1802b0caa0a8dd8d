"""Record what other libraries make of two domains, for test_references.py. Run where SKADA is installed:

    python tests/align/record_references.py OUT.npz --adapt ADAPT --toolbox TRANSFERLEARNING --digits DATA

SKADA 0.6.0 with POT 0.9.7 and cvxopt 1.3; ADAPT a folder with its repository (2025-11-29: its files are run
with its Keras base class left out, which they only inherit); TRANSFERLEARNING J. Wang's toolbox
(jindongwang/transferlearning, f951df1); DATA a folder with MNIST/raw and USPS, whose digits are the real
features.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from skada import CORALAdapter, LinearOTMappingAdapter, SubspaceAlignmentAdapter

DIMS, GAMMA, SHRINKAGE, LAMB = 5, 0.7, 0.3, 0.5
WIDE = 0.1  # gamma where the bounds on weights hold


def random_domains(seed: int, source: int, target: int, width: int) -> dict[str, np.ndarray]:
    """Three classes about other centres, the target turned and moved."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(3, width)) * 2
    turn = np.linalg.qr(random.normal(size=(width, width)))[0] * 0.3 + np.eye(width)
    labels = np.arange(source) % 3, np.arange(target) % 3
    values = [centres[y] + random.normal(size=(len(y), width)) for y in labels]
    return {"xs": values[0], "ys": labels[0], "xt": values[1] @ turn + 0.5, "yt": labels[1]}


def unzipped(path: Path) -> bytes:
    """What a gzip file holds."""
    return gzip.decompress(path.read_bytes())


def digits(folder: Path) -> dict[str, np.ndarray]:
    """Twenty MNIST and twenty USPS digits of each of 0, 1 and 2, at 8 x 8 pixels, 0 to 255."""
    raw = folder / "MNIST" / "raw"
    images = np.frombuffer(unzipped(raw / "t10k-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(unzipped(raw / "t10k-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    wide = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))).astype(float)
    mnist = wide.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64)
    rows, classes = [], []
    for line in bz2.decompress((folder / "USPS" / "usps.t.bz2").read_bytes()).decode().splitlines():
        label, *pairs = line.split()
        rows.append([(float(pair.split(":")[1]) + 1) * 127.5 for pair in pairs])
        classes.append(int(label) - 1)
    usps = np.array(rows).reshape(-1, 8, 2, 8, 2).mean((2, 4)).reshape(-1, 64)
    found = {}
    for name, values, known in (("s", mnist, labels), ("t", usps, np.array(classes))):
        chosen = np.concatenate([np.flatnonzero(known == digit)[:20] for digit in range(3)])
        found[f"x{name}"] = np.round(values[chosen]).astype(np.uint8)
        found[f"y{name}"] = known[chosen].astype(np.int64)
    return found


def unit(values: np.ndarray) -> np.ndarray:
    """Rows of length 1, as the toolbox makes them."""
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def by_skada(adapter: Any, xs: np.ndarray, xt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both domains as an adapter of SKADA's leaves them."""
    both, domain = np.concatenate([xs, xt]), np.repeat([1, -2], [len(xs), len(xt)])
    found = adapter.fit_transform(both, sample_domain=domain)
    return found[: len(xs)], found[len(xs) :]


def load(path: Path, name: str, *mended: tuple[str, str]) -> Any:
    """A class of a file, run by itself; ``mended`` are (text, its replacement)."""
    space: dict[str, Any] = {"__name__": path.stem}
    text = path.read_text()
    for wrong, right in mended:
        assert wrong in text
        text = text.replace(wrong, right)
    exec(compile(text, str(path), "exec"), space)
    return space[name]


def stand_in_for_adapts_base() -> None:
    """What ADAPT's files import of ADAPT, without TensorFlow."""

    class Base:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

        @classmethod
        def _get_param_names(cls) -> list[str]:
            names = "kernel B eps max_size tol max_iter verbose random_state lambda_ n_components"
            return names.split()

    base, utils = types.ModuleType("adapt.base"), types.ModuleType("adapt.utils")
    base.BaseAdaptEstimator = Base  # type: ignore[attr-defined]
    base.make_insert_doc = lambda *args: lambda cls: cls  # type: ignore[attr-defined]
    utils.set_random_seed = lambda seed: None  # type: ignore[attr-defined]
    sys.modules.update({"adapt": types.ModuleType("adapt"), "adapt.base": base, "adapt.utils": utils})


def by_adapt(folder: Path, xs: np.ndarray, xt: np.ndarray) -> dict[str, np.ndarray]:
    """CORAL, subspace alignment and kernel mean matching as ADAPT has them."""
    stand_in_for_adapts_base()
    features, instances = folder / "adapt" / "feature_based", folder / "adapt" / "instance_based"
    coral = load(features / "_coral.py", "CORAL")(lambda_=0.1, verbose=0)
    align = load(features / "_sa.py", "SA")(n_components=DIMS)
    kmm = load(instances / "_kmm.py", "KMM")
    exact = {"kernel": "rbf", "verbose": 0, "tol": 1e-13, "max_iter": 500, "max_size": 1000}
    found = {"adapt_coral": coral.fit_transform(xs, xt), "adapt_sa_source": align.fit_transform(xs, xt)}
    found["adapt_sa_target"] = align.transform(xt)
    found["adapt_kmm"] = kmm(B=1000, eps=None, gamma=GAMMA, **exact).fit_weights(xs, xt)
    found["adapt_kmm_bounded"] = kmm(B=1.5, eps=0.01, gamma=WIDE, **exact).fit_weights(xs, xt)
    return found


def by_toolbox(folder: Path, data: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """The weights that TCA and JDA put on features (primal) or on all samples (rbf)."""
    solutions: list[np.ndarray] = []
    solve = scipy.linalg.eig

    def watched(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = solve(a, b)
        solutions.append(np.real(vectors[:, np.argsort(values)[:DIMS]]))
        return values, vectors

    scipy.linalg.eig = watched
    xs, xt, ys, yt = unit(data["xs"]), unit(data["xt"]), data["ys"] + 1, data["yt"] + 1
    settings = {"kernel_type": kind, "dim": DIMS, "lamb": LAMB, "gamma": GAMMA}
    load(folder / "TCA" / "TCA.py", "TCA")(**settings).fit(xs, xt)
    tca = solutions.pop()
    # From its third round on the toolbox takes the last class's e for that of all samples.
    mended = (
        ("C = len(np.unique(Ys))", "C = len(np.unique(Ys)); first = e"),
        ("M0 = e * e.T", "M0 = first * first.T"),
    )
    jda = load(folder / "JDA" / "JDA.py", "JDA", *mended)(**settings, T=4)
    jda.fit_predict(xs, ys, xt, yt)
    scipy.linalg.eig = solve
    return {f"tca_{kind}": tca, f"jda_{kind}": np.stack(solutions)}


def main() -> None:
    """Record all domains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    for name in ("adapt", "toolbox", "digits"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    domains = {
        "small": random_domains(1, 40, 40, 8),
        "uneven": random_domains(2, 60, 35, 12),
        "digits": digits(given.digits),
    }
    record: dict[str, np.ndarray] = {}
    for name, data in domains.items():
        xs, xt = data["xs"].astype(float), data["xt"].astype(float)
        if name == "digits":
            xs, xt = xs / 255, xt / 255
        found = dict(data)
        found["skada_coral_source"], found["skada_coral_target"] = by_skada(CORALAdapter(SHRINKAGE), xs, xt)
        found["skada_sa_source"], found["skada_sa_target"] = by_skada(SubspaceAlignmentAdapter(DIMS), xs, xt)
        found["skada_monge"] = by_skada(LinearOTMappingAdapter(reg=0.1), xs, xt)[0]
        found |= by_adapt(given.adapt, xs, xt)
        for kind in ("primal", "rbf"):
            found |= by_toolbox(given.toolbox / "code" / "traditional", {**data, "xs": xs, "xt": xt}, kind)
        record |= {f"{name}.{key}": value for key, value in found.items()}
    np.savez_compressed(given.out, **record)


if __name__ == "__main__":
    main()
