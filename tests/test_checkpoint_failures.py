"""Folders on disk that are broken, or that a save could not finish, and what else lies in them."""

import json
import logging
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from innerloop import Cot, InputError, LatentModel, Slr
from innerloop.disk.folders import MANIFEST
from innerloop.errors import UnreadWarning
from innerloop.model import checkpoint
from tests.kills import killed_at
from tests.models import answers_of, moved, saved, tiny_model
from tests.test_checkpoint import contents


@pytest.mark.parametrize("at", ["weights", "rename"])
def test_a_save_that_fails_leaves_the_old_folder_as_it_was(at, tmp_path, monkeypatch):
    model, rename = tiny_model(Cot()), Path.rename
    folder = saved(model, tmp_path / "run")
    before = contents(folder)

    def fails(self, *args, **options):
        if at == "rename" and self.name != ".run.innerloop.writing":
            return rename(self, *args)
        raise OSError("No space left on device")

    monkeypatch.setattr(*((Path, "rename") if at == "rename" else (checkpoint, "save_file")), fails)
    with pytest.raises(InputError, match=r"could not save to .*run: No space left on device; .* untouched"):
        moved(model).save_pretrained(folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_save_replaces_what_one_before_wrote_and_a_killed_one_left_behind_and_nothing_else(tmp_path):
    (tmp_path / ".run.innerloop.writing").mkdir()
    (tmp_path / ".run.innerloop.writing" / "half.txt").write_text("half")
    model = tiny_model(Cot())
    folder = saved(model, tmp_path / "run")
    for name in ("stale.safetensors", "notes.txt"):
        (folder / name).write_text("from another time")
    change_settings(folder, MANIFEST, "files", **{"stale.safetensors": {}})
    for _ in range(2):
        saved(moved(model), folder)
        assert not {"half.txt", "stale.safetensors"} & set(contents(folder))
        assert (folder / "notes.txt").read_text() == "from another time"
    (folder / "notes.txt").unlink()
    saved(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def slr_folder(tmp_path_factory):
    return saved(tiny_model(Slr()), tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def broken(slr_folder, tmp_path):
    """A copy of a saved folder to break, and what loading it then says."""
    folder = tmp_path / "run"
    shutil.copytree(slr_folder, folder)

    def message() -> str:
        with pytest.raises(InputError) as caught:
            LatentModel.from_pretrained(folder)
        return str(caught.value)

    return folder, message


def change_settings(folder: Path, file: str = "innerloop.json", section: str | None = None, **fields) -> None:
    """Change fields of a JSON file, or of a section of it; what is set to ... goes away."""
    settings = json.loads((folder / file).read_text())
    at = settings if section is None else settings[section]
    for name, value in fields.items():
        at[name] = value
        if value is Ellipsis:
            del at[name]
    (folder / file).write_text(json.dumps(settings))


def test_a_folder_without_settings_is_no_run(broken):
    folder, message = broken
    (folder / "innerloop.json").unlink()
    assert "no innerloop.json" in message() and "give a method" in message()
    assert LatentModel.from_pretrained(folder, method=Cot()).method == Cot()


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"method": "slr"}', '{"method": {}}'])
def test_broken_settings_are_named(broken, text):
    folder, message = broken
    (folder / "innerloop.json").write_text(text)
    assert "innerloop.json" in message()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "slt"}, "did you mean 'slr'"),
        ({"max_lops": 3}, "another version"),
        ({"loop": {"alpha": 7.0}}, "between 0 and 1"),
        ({"loop": {"alhpa": 0.5}}, "innerloop.json: method.loop.alhpa: 'method.loop' has no field 'alhpa'"),
        ({"max_loops": "many"}, "innerloop.json: method.max_loops is many, but must be a whole number"),
        ({"max_loops": None}, "innerloop.json: method.max_loops is empty, but must be a whole number"),
        ({"max_loops": 9}, "does not fit the method 'slr'"),  # parts of another shape
        ({"loop": {"time": "none"}}, "time.table"),  # parts of another method
    ],
)
def test_settings_that_do_not_fit_are_refused(broken, fields, expected):
    folder, message = broken
    change_settings(folder, section="method", **fields)
    assert expected in message()


def test_a_folder_of_settings_that_were_spelled_otherwise_is_refused(broken):
    folder, message = broken
    change_settings(folder, format=...)
    assert message() == (
        f"{folder} was saved by an earlier version of innerloop, whose settings were spelled otherwise: train it again"
    )


def test_settings_written_before_a_field_existed_still_load_the_trained_parts(tmp_path):
    """A new field has a default; a run from before it must not lose its timestep table over that."""
    model = moved(tiny_model(Slr()))
    folder = saved(model, tmp_path / "run")
    change_settings(folder, section="method", teacher_thinks=...)
    loop = json.loads((folder / "innerloop.json").read_text())["method"]["loop"]
    change_settings(folder, section="method", loop={name: value for name, value in loop.items() if name != "detach"})
    loaded = LatentModel.from_pretrained(folder)
    assert loaded.method == model.method
    assert torch.equal(answers_of(loaded), answers_of(model))


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize(("file", "n_kept"), [("innerloop.safetensors", 20), ("model.safetensors", 2000)])
def test_missing_or_cut_weights_are_refused(broken, file, n_kept, damage):
    folder, message = broken
    whole = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "cut":
        (folder / file).write_bytes(whole[:n_kept])
    assert str(folder / file if file.startswith("inner") else folder) in message()


def test_weights_of_other_shapes_than_the_configuration_says_are_refused(broken):
    folder, message = broken
    change_settings(folder, "config.json", intermediate_size=96)
    assert "the weights do not have the shapes that config.json says" in message() and "restore" in message()


@pytest.mark.parametrize(("file", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "3")])
def test_a_tokenizer_that_is_none_is_refused(broken, file, text):
    folder, message = broken
    (folder / file).write_text(text)
    assert "the tokenizer's files cannot be read" in message() and str(folder) in message()


def test_weights_with_a_hole_are_refused_and_nothing_else_is_told(broken):
    """Transformers fills a hole with random numbers and only logs it."""
    folder, message = broken
    handler = logging.StreamHandler(told := StringIO())
    logging.getLogger("transformers").addHandler(handler)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    try:
        assert "model.norm.weight" in message()
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert told.getvalue() == ""


@pytest.mark.parametrize(("file", "name"), [("model", "model.norm.weight"), ("innerloop", "loop.time.table")])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(broken, file, name, number):
    folder, message = broken
    weights = load_file(folder / f"{file}.safetensors")
    weights[name].view(-1)[-1] = number
    save_file(weights, folder / f"{file}.safetensors", {"format": "pt"})
    assert f"holds numbers that are not finite, in {name}: take an earlier checkpoint" in message()


@pytest.mark.parametrize("harm", ["more", "fewer"])
def test_weights_that_the_configuration_knows_nothing_of_are_refused(broken, harm):
    folder, message = broken
    if harm == "fewer":
        change_settings(folder, "config.json", num_hidden_layers=2)
    else:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, "model.layers.2.extra": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    assert "config.json has no place for the weights model.layers.2." in message()


def test_lora_weights_that_do_not_fit_are_refused(tmp_path):
    """Where a run is resumed with other ones, none may be left as drawn."""
    base = saved(tiny_model(Cot()), tmp_path / "base")
    one, other = (
        LatentModel.from_pretrained(base, Cot(), lora={"r": r, "target_modules": names})
        for r, names in ((2, ["q_proj"]), (2, ["q_proj", "v_proj"]))
    )
    with pytest.raises(InputError, match=r"other LoRA layers than backbone.lora: they differ in .*v_proj.* and 1 more"):
        checkpoint.load_parts(other, saved(one, tmp_path / "run"))


def test_a_configuration_that_was_changed_since_is_named(broken):
    folder, _ = broken
    change_settings(folder, "config.json", rms_norm_eps=0.5)  # which no shape tells
    with pytest.warns(UnreadWarning, match=r"config.json is not the one that was saved with the weights"):
        LatentModel.from_pretrained(folder)


FOREIGN = ("tah_config.json", "iter_decider.bin", "lora/adapter_model.safetensors", "medusa/in/head.pkl")


def test_what_belongs_to_a_model_and_is_not_read_is_named(tmp_path):
    model = tiny_model(Cot())
    for part in (model.backbone.lm, model.tokenizer):
        part.save_pretrained(tmp_path)
    for name in (*FOREIGN, "README.md", "notes.json", "training_args.bin", "onnx/model.bin", ".cache/a.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    told = r"also holds iter_decider.bin, lora/, medusa/, tah_config.json, not read by innerloop"
    with pytest.warns(UnreadWarning, match=told):
        LatentModel.from_pretrained(tmp_path, method=Cot())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "decider.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UnreadWarning, match=r"tah_config.json and the weights decider.weight, not read"):
        LatentModel.from_pretrained(tmp_path, method=Cot())


@pytest.mark.parametrize("others", [False, True])
def test_a_model_whose_save_was_killed_at_any_step_is_loaded_as_it_was_or_as_it_will_be(others, tmp_path):
    old, new, step = tiny_model(Cot()), moved(tiny_model(Cot())), 1
    answers, found = [answers_of(model) for model in (old, new)], []
    while True:
        folder = saved(old, tmp_path / str(step) / "run")
        if others:
            (folder / "notes.txt").write_text("mine")
        was_killed = killed_at(step, lambda folder=folder: new.save_pretrained(folder))
        loaded = answers_of(LatentModel.from_pretrained(folder))
        found.append([torch.equal(loaded, one) for one in answers])
        if not was_killed:
            break
        step += 4  # rather than all: each is tried on small files in tests/test_disk.py
    assert found[0] == [True, False] and found[-1] == [False, True] and all(map(any, found))


def test_a_missing_folder_is_named_with_its_nearest_neighbour(slr_folder):
    with pytest.raises(InputError, match=r"rum.*did you mean 'run'"):
        LatentModel.from_pretrained(slr_folder.with_name("rum"))


@pytest.mark.parametrize("n", [1, 4, 8, 11])
def test_a_save_beside_others_files_that_fails_halfway_puts_all_back(n, tmp_path, monkeypatch):
    model = tiny_model(Cot())
    folder = saved(model, tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    before, rename, renamed = contents(folder), Path.rename, []

    def fails(self, target):
        renamed.append(self)
        if len(renamed) == n:
            raise OSError("No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(InputError, match="what was there before is untouched"):
        moved(model).save_pretrained(folder)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "files", [{"../victim.txt": {}, "notes.txt/": {}, "folder": {}}, {"notes.txt": 3}, ["notes.txt"], 7]
)
def test_names_of_files_in_a_manifest_lead_nowhere_else(files, tmp_path):
    model = tiny_model(Cot())
    folder = saved(model, tmp_path / "run")
    (folder / "folder").mkdir()
    for path in (folder / "notes.txt", tmp_path / "victim.txt"):
        path.write_text("mine")
    change_settings(folder, MANIFEST, files=files)
    saved(model, folder)
    assert (folder / "folder").is_dir()
    assert (folder / "notes.txt").read_text() == (tmp_path / "victim.txt").read_text() == "mine"


def test_saving_into_a_folder_of_something_else_leaves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "chapter.txt").write_text("mine")
    model = tiny_model(Slr(n_slots=2, max_loops=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "chapter.txt").read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(".")
    assert (tmp_path / "chapter.txt").read_text() == "mine"
    assert LatentModel.from_pretrained(tmp_path).method == model.method
