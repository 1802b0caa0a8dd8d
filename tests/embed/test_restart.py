"""Nothing lost and nothing twice: kills, restarts, several processes, refusals of damage."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.embed.vectors import matrix, read_all
from tests.support import REPOSITORY, make_images, run_tldist
from tldist import api
from tldist.embed.claims import Claims, take_units

UNITS = 480


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 images: 480 units of 5."""
    return make_images(tmp_path_factory.mktemp("many"), {"a": 1200, "b": 1200})


def start(*settings: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """``tldist embed`` in a process of its own, in units of 5; the test that watches it goes first."""
    command = [sys.executable, "-m", "tldist", "embed", *map(str, settings), "unit_rows=5", "batch_size=8"]
    return subprocess.Popen(
        ["nice", "-n", "19", *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell without job control has SIGINT ignored by all that it starts in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kill_after(process: subprocess.Popen[str], out: Path, units: int) -> int:
    """SIGKILL as soon as ``units`` units are committed; returns how many are when it is dead."""
    while process.poll() is None and len(list((out / "units").glob("[0-9]*.json"))) < units:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list((out / "units").glob("[0-9]*.json")))


def assert_same_vectors(out: Path, reference: Path) -> None:
    """Every id exactly once, bitwise equal vectors, nothing half-written left."""
    table, expected = read_all(out), read_all(reference)
    assert table["id"].to_pylist() == expected["id"].to_pylist()
    assert len(set(table["id"].to_pylist())) == len(table)
    assert matrix(table).tobytes() == matrix(expected).tobytes()
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert json.loads((out / "summary.json").read_text())["status"] == "done"


@pytest.fixture(scope="module")
def undisturbed(many: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's vectors of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    api.embed(model=bundle, data=many, out=out, unit_rows=5, batch_size=8)
    return out


@pytest.fixture(scope="module")
def undisturbed_package(many: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's vectors of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    api.embed(model=package, data=many, out=out, unit_rows=5, batch_size=8)
    return out


@pytest.mark.parametrize("kills", [1, 2])
def test_restart__killed(request: pytest.FixtureRequest, many: Path, tmp_path: Path, kills: int) -> None:
    """The restart does just the units without a marker: the others' files are not touched.

    Once with the bundle, twice with the package.
    """
    model = request.getfixturevalue("bundle" if kills == 1 else "package")
    reference = request.getfixturevalue("undisturbed" if kills == 1 else "undisturbed_package")
    out, done = tmp_path / "out", 0
    for _ in range(kills):
        before = done
        done = kill_after(start(model, f"data={many}", f"out={out}", "workers=1"), out, before + 5)
        assert before + 5 <= done < UNITS
    kept = {path: path.stat().st_mtime_ns for path in (out / "units").glob("[0-9]*.json")}
    api.embed(model=model, data=many, out=out, unit_rows=5, batch_size=8)
    assert len(kept) == done
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert_same_vectors(out, reference)


def test_restart__finished_says_so(package: Path, undisturbed_package: Path, many: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed_package.rglob("*.parquet")}
    outcome = api.embed(model=package, data=many, out=undisturbed_package, unit_rows=5, batch_size=8)
    assert "finished already" in outcome.text
    assert not (undisturbed_package / ".lock").exists()
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_restart__between_the_files_of_a_unit(
    many: Path, package: Path, undisturbed_package: Path, tmp_path: Path
) -> None:
    """Each state that a kill can leave: no marker, a torn temporary file, no summary, no recipe."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed_package, out)
    (out / "units" / "00007.json").unlink()  # killed after the part, before the marker
    (out / "units" / "00011.json").unlink()  # killed before the part
    (out / "part-00011.parquet").rename(out / ".tmp-0123456789ab-part-00011.parquet")
    (out / "units" / ".tmp-0123456789ab-00012.json").write_text("{")
    (out / ".tmp-0123456789ab-summary.json").write_text("{")
    (out / "summary.json").unlink()
    (out / "recipe.yaml").unlink()
    api.embed(model=package, data=many, out=out, unit_rows=5, batch_size=8)
    assert_same_vectors(out, undisturbed_package)
    assert (out / "recipe.yaml").is_file()


def test_restart__before_the_manifest(
    many: Path, package: Path, undisturbed_package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "units").mkdir(parents=True)
    (out / ".lock").touch()
    (out / ".tmp-0123456789ab-manifest.json").write_text("{")
    api.embed(model=package, data=many, out=out, unit_rows=5, batch_size=8)
    assert_same_vectors(out, undisturbed_package)


def test_restart__interrupt_and_terminate(
    many: Path, package: Path, undisturbed_package: Path, tmp_path: Path
) -> None:
    """Ctrl-C exits with 130, SIGTERM with 75; both are recorded, and the same command goes on."""
    out = tmp_path / "out"
    for number, code, status in ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "preempted")):
        process = start(package, f"data={many}", f"out={out}", "workers=1")
        before = len(list((out / "units").glob("*.json")))
        while process.poll() is None and len(list((out / "units").glob("[0-9]*.json"))) < before + 3:
            time.sleep(0.001)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == code, output
        assert json.loads((out / "summary.json").read_text())["status"] == status
        assert "Traceback" not in output
    api.embed(model=package, data=many, out=out, unit_rows=5, batch_size=8)
    assert_same_vectors(out, undisturbed_package)


# -- several processes -----------------------------------------------------------------------------------


def test_processes__two_with_a_package_one_killed(
    many: Path, package: Path, undisturbed_package: Path, tmp_path: Path
) -> None:
    """The one that is left takes over what the other held, and finishes alone."""
    out = tmp_path / "out"
    settings = (package, f"data={many}", f"out={out}", "workers=1")
    pair = [start(*settings, env={"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    kill_after(pair[1], out, 5)
    output, _ = pair[0].communicate(timeout=120)
    assert pair[0].returncode == 0, output
    assert_same_vectors(out, undisturbed_package)


def test_processes__two_share_the_work(
    many: Path, package: Path, undisturbed_package: Path, tmp_path: Path
) -> None:
    """Started at the same moment in a new folder; only the first rank speaks."""
    out = tmp_path / "out"
    settings = (package, f"data={many}", f"out={out}")
    pair = [start(*settings, env={"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "2,400 vectors" in outputs[0]
    assert outputs[1] == ""
    assert_same_vectors(out, undisturbed_package)


@pytest.mark.launcher
def test_processes__two_by_accelerate_launch(
    many: Path, bundle: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += [
        "--main_process_port",
        "0",
        "-m",
        "tldist",
        "embed",
        str(bundle),
        f"data={many}",
        f"out={out}",
    ]
    result = subprocess.run(
        [*launcher, "unit_rows=5", "batch_size=8"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2,400 vectors") == 1
    assert "processes  2" in result.stdout
    assert_same_vectors(out, undisturbed)


WORKER = """
import random, sys, time
from pathlib import Path
from tldist.embed.claims import Claims, take_units
folder, name, units = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
claims = Claims(folder)
def done(unit):
    found = (folder / f"{unit}.done").exists()
    time.sleep(0.001)  # time for another process to finish it between the look and the claim
    return found
def log(text):
    with open(folder / f"{name}.log", "a") as file: file.write(f"{time.monotonic_ns()} {text}\\n")
for unit in take_units(range(units), done, claims, lambda unit: None):
    if unit is None:
        time.sleep(0.01)
        continue
    log(f"begin {unit}")
    time.sleep(random.random() * 0.005)
    log(f"end {unit}")
    (folder / f"{unit}.done").touch()
    claims.give_back(unit)
"""


def test_take_units__no_unit_in_two_hands_and_none_forgotten(tmp_path: Path) -> None:
    """Four processes, one of them killed at a random moment."""
    units = 150
    (tmp_path / ".lock").touch()
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, tmp_path, str(k), str(units)], cwd=REPOSITORY)
        for k in range(4)
    ]
    while len(list(tmp_path.glob("*.done"))) < random.Random(time.time_ns()).randint(1, units // 2):
        time.sleep(0.001)
    workers[0].kill()
    assert [worker.wait(timeout=60) for worker in workers][1:] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.done"))) == units
    spans: dict[int, list[tuple[int, int]]] = {}
    for log in tmp_path.glob("*.log"):
        lines = [line.split() for line in log.read_text().splitlines()]
        for begin, end in zip(lines[::2], lines[1::2]):
            spans.setdefault(int(begin[2]), []).append((int(begin[0]), int(end[0])))
    assert set(spans) == set(range(units))
    for unit_spans in spans.values():
        ordered = sorted(unit_spans)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ordered))
    whole = [unit for unit, unit_spans in spans.items() if len(unit_spans) == 1]
    assert len(whole) >= units - 1  # only the killed process's last unit may have been done again


HOLDER = """
import sys, time
from pathlib import Path
from tldist.embed.claims import Claims
claims = Claims(Path(sys.argv[1]))
print(claims.take(2), claims.take(4), flush=True)
time.sleep(60)
"""


def test_take_units__takes_over_from_the_dead(tmp_path: Path) -> None:
    """What another process holds is waited for, and taken when that process dies."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True True\n"
    claims, taken = Claims(tmp_path), []
    for unit in take_units(range(6), lambda unit: False, claims, lambda unit: None):
        if unit is None and holder.poll() is None:
            assert taken == [0, 1, 3, 5]
            holder.kill()
            holder.wait()
        elif unit is not None:
            taken.append(unit)
    claims.close()
    assert taken == [0, 1, 3, 5, 2, 4]


def test_take_units__the_only_process_never_waits(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    seen: list[int] = []
    taken = list(take_units([3, 4, 9], lambda unit: unit == 4, claims, seen.append))
    claims.close()
    assert (taken, seen) == ([3, 9], [4])


# -- verify ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(undisturbed_package: Path, tmp_path: Path) -> Path:
    """A finished folder to damage."""
    return shutil.copytree(undisturbed_package, tmp_path / "copy")


def test_verify__passes_as_typed(copy: Path) -> None:
    for arguments in ((f"out={copy}", "verify=true"), (copy, "verify=true")):
        result = run_tldist("embed", *arguments, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["rows"] == 2400


def test_verify__finds_one_flipped_bit_anywhere(copy: Path) -> None:
    generator = np.random.default_rng(time.time_ns())
    path = copy / f"part-{generator.integers(UNITS):05d}.parquet"
    data = bytearray(path.read_bytes())
    data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
    path.write_bytes(data)
    result = run_tldist("embed", f"out={copy}", "verify=true", "--json")
    assert result.returncode == 1
    verdict = json.loads(result.stdout.splitlines()[-1])
    assert verdict["status"] == "failed"
    assert any(path.name in problem and "SHA-256" in problem for problem in verdict["problems"])


def test_verify__names_every_difference(copy: Path, package: Path, many: Path) -> None:
    """And what a restart can mend, it mends."""
    for unit in (3, 4):
        (copy / "units" / f"{unit:05d}.json").unlink()
    (copy / "part-00009.parquet").unlink()
    (copy / "extra.parquet").write_bytes(b"x")
    table = pq.read_table(copy / "part-00020.parquet")
    pq.write_table(table.slice(1), copy / "part-00020.parquet")
    outcome = api.embed(out=copy, verify=True)
    text = "\n".join(outcome.values["problems"])
    assert not outcome.passed
    for expected in ("2 of 480 units missing", "part-00009.parquet: missing", "extra.parquet", "4 rows"):
        assert expected in text
    (copy / "extra.parquet").unlink()
    for unit in (9, 20):
        (copy / "units" / f"{unit:05d}.json").unlink()
    api.embed(model=package, data=many, out=copy, unit_rows=5, batch_size=8)
    assert api.embed(out=copy, verify=True).passed


def test_verify__not_a_folder_of_vectors_is_wrong_input(tmp_path: Path) -> None:
    result = run_tldist("embed", f"out={tmp_path}", "verify=true")
    assert result.returncode == 2
    assert "manifest" in result.stderr


# -- without torch ---------------------------------------------------------------------------------------


def test_package__needs_no_torch(
    many: Path, package: Path, undisturbed_package: Path, tmp_path: Path
) -> None:
    """Every module of the stage but the PyTorch engine, and the whole of a run with a package."""
    out = tmp_path / "out"
    command = ["embed", str(package), f"data={many}", f"out={out}", "unit_rows=5", "batch_size=8"]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import tldist.embed as stage, pkgutil, importlib\n"
        "for module in pkgutil.iter_modules(stage.__path__):\n"
        "    if module.name != 'torch_engine': importlib.import_module(f'tldist.embed.{module.name}')\n"
        "from tldist.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert_same_vectors(out, undisturbed_package)
