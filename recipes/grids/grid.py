"""Many trainings of one recipe, several at once, each in a process of its own, and none done twice."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from recipes.errors import BadInput, leave
from recipes.images.cli import CONFIGS
from recipes.images.saving import out_of_room
from recipes.record import write_json
from torch_meanfield.lightning import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "recipes/cifar.py"
POLL = 0.5  # seconds


@contextmanager
def one_line_endings(script: str) -> Iterator[None]:
    """What ends a grid early is told in one line: exit code 2 for what its user can mend, 1 for failed trainings.

    Args:
        script: Its name, before the line.
    """
    try:
        yield
    except BadInput as error:
        leave(script, error)
    except Failed as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except OSError as error:
        if out_of_room(error) is None:
            raise
        leave(script, BadInput(f"no room on the disk ({error}); make room, and the same command goes on from here"))
    except KeyboardInterrupt:
        print(f"{script}: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: Name of its folder and of its record.
        config: File in recipes/configs.
        args: Further arguments of ``recipes/cifar.py fit``.
        epochs: Number of epochs.
    """

    name: str
    config: str
    args: tuple[str, ...]
    epochs: int

    @property
    def command(self) -> str:
        """What a reader types to do this one alone."""
        return shlex.join(["python", SCRIPT, "fit", "--config", f"recipes/configs/{self.config}", *self.args])


class Failed(RuntimeError):
    """Trainings that ended with an error; the others are done."""


class Place:
    """Where the pieces of one job lie: ``FOLDER/NAME/`` and its record ``FOLDER/NAME.json``."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.record, self.pieces = job, folder / f"{job.name}.json", folder / job.name

    def check(self) -> None:
        """Raise :class:`BadInput` if the folder holds a job of this name with other arguments."""
        for path in (self.record, self.pieces / "job.json"):
            if not path.exists():
                continue
            command = json.loads(path.read_text())["command"]
            if command != self.job.command:
                raise BadInput(
                    f"--out: {path} is of another configuration ({command}), not of {self.job.command}; pass another "
                    f"folder, or the options it was begun with"
                )

    def versions(self) -> list[Path]:
        """The log folders of its pieces, the latest first."""
        return sorted(self.pieces.glob("*/version_*"), key=lambda p: int(p.name.rsplit("_", 1)[1]), reverse=True)

    def checkpoint(self) -> Path | None:
        """The latest checkpoint that is whole."""
        return newest_checkpoint(self.pieces, "*/version_*/checkpoints/last.ckpt")

    def epochs(self) -> int:
        """How many epochs are done."""
        if self.record.exists():
            return self.job.epochs
        for version in self.versions():
            with suppress(OSError, ValueError):
                return len(json.loads((version / "curve.json").read_text())["epochs"])
        return 0

    def finish(self) -> bool:
        """Write the record, if a piece has come to its end."""
        for version in self.versions():
            path = version / "run.json"
            if path.exists():
                run = json.loads(path.read_text())
                write_json(self.record, {"name": self.job.name, "command": self.job.command, **run})
                return True
        return False

    def log(self) -> str:
        """What the processes printed."""
        path = self.pieces / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""


class Running:
    """A started job. Its lock is the process's as well, so it outlives this script if the script is killed."""

    def __init__(self, place: Place, lock: IO[str], slot: int, threads: int) -> None:
        self.place, self.slot, self._lock = place, slot, lock
        job = place.job
        write_json(place.pieces / "job.json", {"command": job.command})
        command = [sys.executable, str(ROOT / SCRIPT), "fit", "--config", str(CONFIGS / job.config), *job.args]
        command += ["--trainer.default_root_dir", str(place.pieces)]
        checkpoint = place.checkpoint()
        if checkpoint is not None:
            command += ["--ckpt_path", str(checkpoint)]
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), **_one_gpu(slot))
        with (place.pieces / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock.fileno()],
            )

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()


def _one_gpu(slot: int) -> dict[str, str]:
    """The jobs take the visible GPUs in turn; each sees one, so that none spreads over all of them."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    known = visible if len(visible) == count else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": known[slot % count]}


def at_once_by_default() -> int:
    """Three runs on each GPU, which small images leave idle most of the time; else one on each core."""
    return 3 * torch.cuda.device_count() or len(os.sched_getaffinity(0))


def carry_out(
    jobs: Sequence[Job],
    folder: Path,
    at_once: int,
    threads: int = 1,
    finished: Callable[[dict[str, dict[str, Any]]], None] = lambda records: None,
) -> dict[str, dict[str, Any]]:
    """The records of all jobs by name: read where they exist, else made.

    Records are kept in ``folder``; a job that was interrupted goes on from its last checkpoint. If one runs out of
    device memory beside others, fewer are run at once from then on.

    Args:
        jobs: What to train, in this order.
        folder: Folder of records and pieces.
        at_once: Largest number that run side by side.
        threads: Threads of the processor, for each.
        finished: Called with the records so far after each that is done.

    Raises:
        BadInput: ``folder`` holds a job of the same name with other arguments; nothing has been started then.
        Failed: Some jobs ended with an error, which is quoted; all others have been done.
    """
    places = [Place(job, folder) for job in jobs]
    for place in places:
        place.check()
    records = {p.job.name: json.loads(p.record.read_text()) for p in places if p.record.exists()}
    waiting, running, errors = deque(p for p in places if p.job.name not in records), [], []
    # A line a minute where the bar goes to a file.
    often = 1 if sys.stderr.isatty() else 60
    bar = tqdm(total=sum(job.epochs for job in jobs), unit="epoch", disable=not waiting, mininterval=often)
    told: set[str] = set()
    try:
        while waiting or running:
            for _ in range(len(waiting)):
                if len(running) >= at_once:
                    break
                place = waiting.popleft()
                lock = _locked(place)
                if lock is None:  # of a script that was killed, or of another one: its process is still at it
                    waiting.append(place)
                    if place.job.name not in told:
                        bar.write(f"{place.job.name}: another process is training it; waiting for that one")
                        told.add(place.job.name)
                elif place.finish():  # by that other process
                    lock.close()
                    _enter(place, records, bar, finished)
                else:
                    running.append(Running(place, lock, _free(r.slot for r in running), threads))
            time.sleep(POLL)
            for run in [r for r in running if r.process.poll() is not None]:
                running.remove(run)
                run.close()
                if run.process.returncode == 0 and run.place.finish():
                    _enter(run.place, records, bar, finished)
                elif running and "out of memory" in run.place.log():
                    at_once = len(running)
                    bar.write(f"{run.place.job.name}: out of memory; going on with {at_once} at once")
                    (run.place.pieces / "log.txt").rename(run.place.pieces / "log-out-of-memory.txt")
                    waiting.appendleft(run.place)
                else:
                    errors.append(f"{run.place.job.name}: {_last_line(run.place)}")
                    bar.write(errors[-1])
            bar.update(sum(p.epochs() for p in places) - bar.n)
    finally:
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
            run.close()
        bar.close()
    if errors:
        raise Failed("; ".join(errors))
    return {job.name: records[job.name] for job in jobs}


def _enter(place: Place, records: dict[str, Any], bar: Any, finished: Callable[[dict[str, Any]], None]) -> None:
    record = records[place.job.name] = json.loads(place.record.read_text())
    error = record["epochs"][-1].get("val_error", float("nan"))
    bar.write(f"{place.job.name}: test error {error:.2f} %, {record['seconds']:.0f} s")
    finished(records)


def _locked(place: Place) -> IO[str] | None:
    """The lock of a job, or ``None`` if a process holds it."""
    place.pieces.mkdir(parents=True, exist_ok=True)
    lock = (place.pieces / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _free(taken: Iterable[int]) -> int:
    slots = set(taken)
    return next(i for i in range(len(slots) + 1) if i not in slots)


def _last_line(place: Place) -> str:
    lines = [line for line in place.log().splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else 'it printed nothing'} (all of it in {place.pieces / 'log.txt'})"
