"""A teacher that thinks in latents: its states and predictions as targets, against sums written by hand."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from innerloop import Cot, Example, InputError, LatentModel, LatentTrainer, LatentTrainingArguments, Pause, Slr
from innerloop.methods import Method
from innerloop.text.encoder import PromptEncoder
from innerloop.train.recipe import parse_recipe
from innerloop.train.run import run_recipe
from tests.methods.tools import MIXED, assert_close, by_region, change, gradients, stir, thought_of
from tests.models import saved, tiny_model

TEACHER = Slr(n_slots=3, max_loops=3)
STUDENT = Slr(n_slots=3, max_loops=3, teacher_thinks="latents", teacher="-", hid={"weight": 1.0}, kd={"weight": 1.0})
WIDE = {"width": 48}


def made(method: Method, seed: int = 0, **changes) -> LatentModel:
    model = tiny_model(method, "gpt2", seed, num_hidden_layers=2, **changes)
    stir(model)
    return model


def student_of(teacher: LatentModel, folder: Path, seed: int = 0, **fields) -> LatentModel:
    return made(change(STUDENT, teacher=str(saved(teacher, folder / "teacher")), **fields), seed)


def states_of(model: LatentModel) -> list[Tensor]:
    """The states h_1..h_T of all rows (B, N, D)."""
    with torch.no_grad():
        return [state for _, state in thought_of(model, MIXED).loop.states]


@by_region
def test_a_model_that_is_its_teacher_has_nothing_to_learn_from_it(scope, tmp_path: Path):
    teacher = made(change(TEACHER, loop_scope=scope))
    student = student_of(teacher, tmp_path, loop_scope=scope)
    terms = student.eval().loss(MIXED).terms
    assert terms["hid"] < 1e-6 and terms["kd"].abs() < 1e-6
    other = student_of(made(change(TEACHER, loop_scope=scope), seed=3), tmp_path, loop_scope=scope).eval()
    assert min(other.loss(MIXED).terms[name] for name in ("hid", "kd")) > 1e-2


@pytest.mark.parametrize(
    ("step_map", "pairs"), [("stretch", {3: (2, 4, 5), 2: (3, 5)}), ("one2one", {3: (1, 2, 5), 2: (1, 2)})]
)
@pytest.mark.parametrize("scope", ["slots", "all"])
def test_the_terms_are_those_of_sums_by_hand(step_map, pairs, scope, tmp_path: Path):
    """The teacher is wider and iterates five times; rows of the student three times, or, cut short, twice."""
    teacher = made(change(TEACHER, max_loops=5, loop_scope=scope), seed=3, hidden_size=48)
    student = student_of(teacher, tmp_path, hid=WIDE, step_map=step_map, loop_scope=scope).double().eval()
    student.load_teacher().double()
    teacher = copy.deepcopy(student.load_teacher())
    ours, theirs = states_of(student), states_of(teacher)
    for t in (3, 2):
        rows = student.rows(MIXED)
        for row in rows:
            row.n_loops = t
        batch = student.batch(rows)
        real = student.think(batch).state_mask
        real = torch.ones(ours[0].shape[:2]) if real is None else real
        spread = torch.stack(theirs)[:, real.bool()].float().std()
        total = 0.0
        for row, mask in enumerate(real.bool()):
            distances = [
                smooth_l1_loss(
                    student.teacher_projection(ours[i][row, mask]) / spread, theirs[at - 1][row, mask] / spread
                ).item()
                for i, at in enumerate(pairs[t])
            ]
            total += sum(distances) / len(distances) / len(real)
        with torch.no_grad():
            out, logits = student(batch), student.written_logits(batch, student.think(batch))
        wanted = torch.cat(teacher.answer_logits(MIXED))
        p, q = (wanted / 2).softmax(-1), (logits / 2).softmax(-1)
        assert out.terms["hid"].item() == pytest.approx(total, rel=1e-5)
        assert out.terms["kd"].item() == pytest.approx(4 * (p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
        assert out.loss.item() == pytest.approx(sum(out.terms.values()).item(), rel=1e-5)
        student.loss_chunk = 3
        assert student(batch).terms["kd"].item() == pytest.approx(out.terms["kd"].item(), rel=1e-5)


def test_gradients_reach_the_student_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Slr, "answer_weight", 0.0)
    student = student_of(made(TEACHER, seed=3, hidden_size=48), tmp_path, hid=WIDE).train()
    got = gradients(student, student.loss(MIXED).loss)
    assert all(got[name].abs().max() > 0 for name in ("teacher_projection.weight", "loop.time.table"))
    teacher = student.load_teacher()
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any("teacher" in name.replace("teacher_projection", "") for name in student.state_dict())
    by_chunks = copy.deepcopy(student)
    by_chunks.eval().loss_chunk = 2
    assert_close(by_chunks.loss(MIXED).loss, student.eval().loss(MIXED).loss, 1e-5)


def test_rows_that_stop_early_on_either_side_keep_their_last_state(tmp_path: Path):
    at_once = {"stop.rule": "delta", "stop.threshold": -math.inf}
    student = student_of(made(change(TEACHER, **at_once), seed=3), tmp_path, **at_once).eval()
    assert all(math.isfinite(student.loss(MIXED).terms[name]) for name in ("hid", "kd"))


def test_what_was_learned_from_a_wider_teacher_answers_with_other_numbers_of_loops(tmp_path: Path):
    student = student_of(made(TEACHER, seed=3, hidden_size=48), tmp_path, hid=WIDE)
    again = LatentModel.from_pretrained(saved(student, tmp_path / "student"), device="cpu")
    assert again.generate(["3 ; + 4"], loops=5, max_new_tokens=2)[0].cost.passes > 5
    steps = change(STUDENT, teacher_thinks="steps", kd={"weight": 0.0}, hid=WIDE)
    assert (steps.with_loops(2).max_loops, steps.with_loops(2).hid.width) == (2, 0)


def test_with_the_identity_as_projection_written_steps_are_followed_as_without_one(tmp_path: Path):
    folder = str(saved(made(Cot(), 3), tmp_path / "teacher"))
    steps = change(STUDENT, teacher_thinks="steps", kd={"weight": 0.0}, hid={"width": 32}, teacher=folder)
    model = made(steps).eval()
    plain = LatentModel(model.backbone, model.tokenizer, change(steps, hid={"width": 0})).eval()
    plain.loop.load_state_dict(model.loop.state_dict())
    torch.nn.init.eye_(model.teacher_projection.weight)
    assert_close(model.loss(MIXED).terms["hid"], plain.loss(MIXED).terms["hid"], 1e-6)


@pytest.mark.parametrize(
    ("method", "changes", "fields", "words"),
    [
        (Slr(n_slots=4), {}, {}, "lays out a question in another way than this model"),
        (change(TEACHER, loop_scope="last"), {}, {}, "lays out a question in another way"),
        (Cot(), {}, {}, "the tokens of the teacher in .* have other ids"),
        (Pause(n_pauses=3), {}, {}, "does not loop, so there are no states to follow"),
        (TEACHER, {"hidden_size": 48}, {}, "states of width 48, this model follows with 32: set hid.width to 48"),
        (TEACHER, {}, {"hid.width": 48}, "states of width 32, this model follows with 48: set hid.width to 32"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(method, changes, fields, words, tmp_path: Path):
    student = student_of(made(method, **changes), tmp_path, **fields)
    with pytest.raises(InputError, match=words):
        student.loss(MIXED)
    assert not student._frozen


def test_a_teacher_reads_running_text_where_the_model_does(tmp_path: Path):
    student = student_of(made(TEACHER), tmp_path)
    student.encoder = PromptEncoder(student.tokenizer, running_text=True)
    terms = student.eval().loss([Example("3 + 4 = 2", (), " 2 * 2 = 4")]).terms
    assert terms["hid"] < 1e-6 and terms["kd"].abs() < 1e-6


def test_a_teacher_that_cannot_read_the_longest_example_is_refused_before_training(tmp_path: Path):
    student = student_of(made(TEACHER, max_position_embeddings=12), tmp_path)
    args = LatentTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    with pytest.raises(InputError, match=r"reads at most 12: set train\.max_length=12"):
        LatentTrainer(student, args, MIXED)


def test_a_teacher_may_differ_in_width_where_only_its_predictions_are_learned(tmp_path: Path):
    student = student_of(made(Pause(n_pauses=3), hidden_size=48), tmp_path, hid={"weight": 0.0})
    assert set(student.loss(MIXED).terms) == {"answer", "kd"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"teacher": None}, "set teacher"),
        ({"teacher": "self"}, "set teacher to its folder"),
        ({"hid.weight": 0.0, "kd.weight": 0.0}, "hid.weight or kd.weight above 0"),
        ({"teacher_thinks": "steps"}, "kd.weight is for what a teacher predicts on the same rows"),
        ({"loop_scope": "append", "hid.weight": 0.0}, "loop_scope to slots, all or last"),
        ({"hid.layers": "all"}, "leave hid.layers and hid.site out"),
        ({"hid.site": "last"}, "leave hid.layers and hid.site out"),
        ({"curriculum.max_stage": 2}, "knows no written steps"),
        ({"decoder.kind": "linear", "decoder.classes": ("1", "2")}, "writes nothing that could be predicted"),
        ({"kd.weight": -1.0}, "weight is -1.0, but must be a number, at least 0"),
        ({"kd.temperature": 0.0}, "temperature is 0.0, but must be a number, above 0"),
    ],
)
def test_impossible_settings_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        change(STUDENT, **fields)


def test_a_run_that_cannot_learn_from_its_teacher_is_refused_before_anything_is_written(tmp_path: Path):
    scratch = {"type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    raw = {
        "task": {"name": "chain", "n_ops": 2, "n_train": 16},
        "backbone": {"scratch": {**scratch, "num_attention_heads": 2}},
        "method": {"name": "slr", "n_slots": 3, "max_loops": 2},
        "train": {"max_steps": 2, "batch_size": 4, "use_cpu": True, "save_strategy": "no"},
        "out": str(tmp_path / "teacher"),
    }
    run_recipe(parse_recipe(raw))
    learns = {"teacher": raw["out"], "teacher_thinks": "latents", "hid": {"weight": 1.0}, "kd": {"weight": 1.0}}
    taught = {**raw, "method": {**raw["method"], **learns}, "out": str(tmp_path / "taught")}
    other = {"method": {**taught["method"], "n_slots": 2}}
    cached = {"train": {**raw["train"], "teacher_cache": str(tmp_path / "states")}}
    for changes, words in ((other, "lays out a question in another way"), (cached, "leave teacher_cache out")):
        with pytest.raises(InputError, match=words):
            run_recipe(parse_recipe({**taught, **changes}))
    assert not (tmp_path / "taught" / "config.yaml").exists()
    assert (run_recipe(parse_recipe(taught)) / "finished").exists()
