"""Files and folders are whole or as they were, whoever is killed and when; one process writes a run."""

import os
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from innerloop import InputError
from innerloop.disk.files import HOST, append, check_writable, replacing, write_text
from innerloop.disk.folders import damage, manifest, place, remove, replacing_folder, settle
from innerloop.disk.lock import MARK, locked
from innerloop.text.examples import Example, write_examples
from tests.kills import killed_at

# Files


@pytest.fixture
def full_disk():
    """A disk on which no file can be larger than a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_tensors(path: Path) -> None:
    with replacing(path) as aside:
        save_file({"a": torch.zeros(1000)}, aside)


def write_folder(path: Path) -> None:
    with replacing_folder(path) as aside:
        (aside / "a").write_text("long" * 100)


WRITERS = {
    "text": lambda path: write_text(path, "long" * 100),
    "tensors": write_tensors,
    "examples": lambda path: write_examples([Example("why" * 100, (), "so")], path),
    "folder": write_folder,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_on_a_full_disk_what_was_there_stays_and_nothing_half_is_left(write, tmp_path, full_disk):
    path = tmp_path / "old.jsonl"
    path.write_text("old")
    with pytest.raises(InputError, match=r"old.jsonl: .*[Ff]ile too large.*; what was there before is untouched"):
        write(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("old.jsonl", "old")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_cannot_be_written_to_is_one_sentence(write):
    with pytest.raises(InputError, match=r"/proc/"):
        write(Path("/proc/self/new/old.jsonl"))


def test_links_are_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "result.json"
    victim.write_text("mine")
    for name in (".result.json.writing", f".result.json.{HOST}-{os.getpid()}-0.writing", "result.json", "log"):
        (tmp_path / name).symlink_to(victim)
    write_text(path, "new")
    with pytest.raises(InputError, match=r"could not write .*log"):
        append(tmp_path / "log", "line\n")
    assert victim.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    write_text(tmp_path / "a", "old")
    (tmp_path / f".a.{HOST}-{dead()}-0.writing").write_text("half")
    (tmp_path / f".a.{HOST}-{os.getppid()}-0.writing").write_text("of one that lives")
    assert killed_at(3, lambda: write_text(tmp_path / "a", "new"))
    assert (tmp_path / "a").read_text() == "old"
    write_text(tmp_path / "a", "new")
    pids = {path.name.split("-")[-2] for path in tmp_path.glob(".a.*")}
    assert pids == {str(os.getpid()), str(os.getppid())} and (tmp_path / "a").read_text() == "new"


def dead() -> int:
    """Return the number of a process that is gone."""
    return in_a_process(lambda: None)[0]


def in_a_process(does) -> tuple[int, int]:
    """Run something in a process of its own; return its number and how it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does not use
        pid = os.fork()
    if pid == 0:
        try:
            does()
            os._exit(0)
        finally:
            os._exit(1)
    return pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_lines_are_appended_after_one_that_was_cut_short(tmp_path):
    path = tmp_path / "log"
    append(path, "one\n")
    path.write_text(path.read_text() + '{"tw')
    append(path, "three\n")
    assert path.read_text() == 'one\n{"tw\nthree\n'


def test_asking_whether_a_folder_can_be_written_to_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new", "else")
    assert list((tmp_path / "new").iterdir()) == []


# Folders

OLD, NEW = {"both": "old", "gone": "old", "in/both": "old"}, {"both": "new", "in/both": "new", "in/more": "new"}


def test_a_folder_that_cannot_be_sealed_leaves_nothing_half(tmp_path, full_disk):
    (tmp_path / "elsewhere").mkdir()
    for name in "abcd":
        (tmp_path / "elsewhere" / name).touch()  # whose names and checksums are more than the disk holds
    with pytest.raises(InputError, match="could not write"):
        place(tmp_path / "elsewhere", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def write_all(path: Path, files: dict[str, str]) -> None:
    with replacing_folder(path) as aside:
        for name, text in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(text)


def read_all(path: Path) -> dict[str, str]:
    files = {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}
    return {name: text for name, text in files.items() if name != "manifest.json"}


@pytest.mark.parametrize("others", [{}, {"notes": "mine"}, {"in/notes": "mine"}], ids=["alone", "beside", "inside"])
@pytest.mark.parametrize("before", [OLD, {}], ids=["over", "first"])
def test_a_folder_killed_at_any_step_is_the_old_or_the_new_one(before, others, tmp_path):
    step, found = 1, []
    while True:
        path = tmp_path / str(step) / "run"
        if before:
            write_all(path, before)
        for name, text in others.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
        was_killed = killed_at(step, lambda path=path: write_all(path, NEW))
        settle(path)
        now = read_all(path)
        assert now in ({**before, **others}, {**NEW, **others})
        assert not now or damage(path) is None or now == others
        found.append("new" in now.values())
        write_all(path, NEW)
        assert read_all(path) == {**NEW, **others} and damage(path) is None
        assert [p.name for p in path.parent.iterdir()] == ["run"]
        if not was_killed:
            break
        step += 1
    assert step > 5 and found[-1] and not found[0] and found == sorted(found)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_text("ne"), "both has 2 bytes, where 3 were written"),
        (lambda path: path.write_text("old"), "both is not what was written"),
        (lambda path: path.unlink(), "both is missing"),
        (lambda path: path.with_name("manifest.json").unlink(), "it has no manifest.json"),
        (lambda path: path.with_name("manifest.json").write_text("{"), "it has no manifest.json"),
    ],
)
def test_damage_is_named(harm, said, tmp_path):
    write_all(tmp_path / "run", NEW)
    assert damage(tmp_path / "run") is None
    harm(tmp_path / "run" / "both")
    assert damage(tmp_path / "run") == said


def test_removing_a_folder_leaves_others_files(tmp_path):
    write_all(tmp_path / "run", NEW)
    (tmp_path / "run" / "in" / "notes").write_text("mine")
    remove(tmp_path / "run")
    assert read_all(tmp_path / "run") == {"in/notes": "mine"} and manifest(tmp_path / "run") is None
    (tmp_path / "run" / "in" / "notes").unlink()
    write_all(tmp_path / "run", NEW)
    remove(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Runs


def test_a_run_is_written_by_one_process_and_a_killed_one_has_no_lock(tmp_path):
    def tries() -> None:
        with pytest.raises(InputError, match=f"is being written by process {os.getppid()} on "), locked(tmp_path):
            pass

    def dies() -> None:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    with locked(tmp_path), locked(tmp_path):
        assert in_a_process(tries)[1] == 0
    pid, code = in_a_process(dies)
    assert code == -signal.SIGKILL and f'"pid": {pid}' in (tmp_path / MARK).read_text()
    with locked(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / MARK).read_text()


def test_others_files_are_in_the_way_of_a_run_and_its_own_are_not(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(InputError, match="checkpoint-1 was not written by a run"), locked(tmp_path, ["checkpoint-*"]):
        pass
    (tmp_path / "checkpoint-1").rmdir()
    for _ in range(2):
        with locked(tmp_path, ["checkpoint-*"]):
            (tmp_path / "checkpoint-1").mkdir(exist_ok=True)


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
