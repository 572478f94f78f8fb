"""Think-at-Hard while answering: rows wait for their own hard tokens, the decider decides, and work is counted."""

import pytest
import torch
from torch import Tensor

from innerloop import InputError, LatentModel, Tah
from innerloop.engine.generation import Generation
from innerloop.methods.depth import decider
from innerloop.methods.depth.decider import FREE
from tests.methods.reference_tah import read, slow
from tests.methods.tools import MIXED, QUESTIONS, assert_close, by_arch, change, logits_of, on, stir, with_token
from tests.models import tiny_model

V = 15
SMALL = Tah(lora={"rank": 2}, decider={"width": 8, "blocks": 1}, input_mix_topk=4)


def scores_of(model: LatentModel) -> list[Tensor]:
    """Return the list to which the decider's logits are added from now on."""
    found: list[Tensor] = []
    model.depth.chooser.decider.register_forward_hook(lambda module, args, out: found.append(out))
    return found


def own(arch: str, method: Tah, ends: float = 1.4, **changes) -> LatentModel:
    """Return a model with weights of its own; the more ``ends`` is above 1, the sooner rows end."""
    model = tiny_model(method, arch, num_hidden_layers=2, **changes).double()
    stir(model)
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight[model.encoder.eos_id] *= ends
    return model


def deciding(arch: str, method: Tah = SMALL, share: float = 0.5, **changes) -> LatentModel:
    """Return a model in which about a share of the tokens asked about goes on."""
    probe = own(arch, change(method, tau=0.0), **changes)
    scores = scores_of(probe)
    probe.generate(QUESTIONS, max_new_tokens=8)
    chances = torch.cat(scores).sigmoid().sort().values
    middle = chances[int(len(chances) * (0.85 - share)) : int(len(chances) * (1.15 - share))]
    widest = int(middle.diff().argmax())  # no token is so near tau that rounding decides
    return own(arch, change(method, tau=middle[widest : widest + 2].mean().item()), **changes)


def depths_of(model: LatentModel, question: str, generation: Generation) -> tuple[list[int], list[int]]:
    """Return how often the tokens of the question and the written ones were read."""
    (row,), depths = model.prompts([question]), [depth for _, depth in generation.depths]
    return depths[: len(row)], depths[len(row) :]


# Waiting


@pytest.mark.parametrize(
    "settings",
    [{}, {"prompt_iterates": True}, {"max_loops": 3, "lora.kind": "per_iter"}, {"depth_attention": "depth1_only"}],
    ids=["default", "prompt", "three", "depth1_only"],
)
@by_arch
def test_what_is_written_is_what_the_slow_reference_shows_for_the_same_depths(arch, settings, answers):
    """A batch in which rows wait for their own tokens alone == single rows == the slow reference."""
    model = deciding(arch, change(SMALL, **settings))
    together, found = answers(model), set()
    for question, one in zip(QUESTIONS, together):
        (alone,), (row,) = answers(model, [question]), model.prompts([question])
        assert (one.ids, one.depths) == (alone.ids, alone.depths)
        assert (one.cost.passes, one.cost.positions) == (alone.cost.passes, alone.cost.positions)
        assert one.cost.flops == pytest.approx(alone.cost.flops, rel=1e-12)
        asked, written = depths_of(model, question, one)
        assert len(written) == len(one.ids) - 1  # nothing reads the last
        logits = slow(model, [*row.ids(), *one.ids[:-1]], [*asked, *written])[len(row) - 1 :]
        logits[:, model.suppressed_ids()] = -torch.inf
        assert logits.argmax(-1).tolist() == one.ids
        found |= set(asked[-1:] + written)
        assert asked[:-1] == [1] * (len(row) - 1) or model.method.prompt_iterates
    assert found == set(range(1, model.method.max_loops + 1))
    assert len({len(one.ids) for one in together}) > 1  # rows end at different times
    model.depth.waits = False  # a model that does not wait writes the same
    for one, other in zip(together, answers(model)):
        assert (one.ids, one.cost.passes) == (other.ids, other.cost.passes)
        assert one.depths == other.depths[: len(one.depths)]  # what has ended rides along, and is listed too


@by_arch
def test_teacher_forcing_shows_what_was_written_and_the_decider_does_not_leak(arch):
    """The pass of the loss and the passes of generation are one policy: the same tokens iterate."""
    model = deciding(arch)
    for i, row in enumerate(model.rows(MIXED)):
        batch = model.batch([row])
        with torch.no_grad():
            thought = model.think(batch)
            logits = model.written_logits(batch, thought)
        depths, first = thought.deep[-1].depths_BL[0].tolist(), len(row) - len(logits)
        assert_close(logits, slow(model, row.ids(), depths)[first - 1 : -1], 1e-6)
        assert set(depths[: first - 1]) <= {1} and depths[-1] == 1  # only what predicts a written token
        for at in range(first, len(row) - 1) if i < 2 else ():
            moved = logits_of(model, [with_token(row, at, (row.ids()[at] + 1) % V)])[0]
            assert_close(moved[: at - first + 1], logits[: at - first + 1], 1e-6)
            assert (moved - logits)[at - first + 1 :].abs().amax(1).min() > 1e-6


def test_a_row_reads_no_further_than_the_model_can(answers):
    """Rows that wait are late; none goes on past its budget while it waits for the others to end."""
    short = {"max_position_embeddings": 16}
    for model in (own("gpt2", change(SMALL, iterate="always"), **short), deciding("gpt2", **short)):
        for question, generation in zip(QUESTIONS, answers(model, n=40)):
            assert generation.ended or len(generation.ids) == 16 - len(model.prompts([question])[0])


@by_arch
def test_the_batch_takes_as_many_passes_as_its_slowest_row(arch, answers):
    model, n_passes = deciding(arch, share=0.2, ends=0.0), []
    model.backbone.decoder.register_forward_pre_hook(lambda module, args: n_passes.append(1))
    together = answers(model, n=8)
    asked, written = zip(*(depths_of(model, question, one) for question, one in zip(QUESTIONS, together)))
    needed = max(map(max, asked)) + max(map(sum, written))
    assert len(n_passes) == needed and not any(one.ended for one in together)
    n_passes.clear()
    model.depth.waits = False
    answers(model, n=8)
    assert len(n_passes) > needed  # wherever any row has a hard token, all wait


# The decider


def free_depths(model: LatentModel, ids: Tensor) -> Tensor:
    """Return how often tokens (B, L) are read if only the decider says."""
    return read(model, ids, torch.full_like(ids, FREE))[1].depth.passes[0].depths_BL


def test_a_token_goes_on_if_the_decider_is_surer_than_tau_unless_its_depth_is_known():
    model, ids = on("llama", change(SMALL, tau=0.3)), torch.randint(0, 18, (2, 7))
    scores = scores_of(model)
    went = free_depths(model, ids) == 2
    assert torch.equal(went, (scores[0].sigmoid() > 0.3).view(2, 7))
    surest = scores[0].sigmoid().max().item()
    for tau, n_went in ((surest, 0), (surest - 1e-9, 1)):  # strictly surer
        model.depth.chooser.choice = change(SMALL, tau=tau)
        assert (free_depths(model, ids) == 2).sum() == n_went
    model.depth.chooser.decider.leave.bias.data.fill_(1e3)
    model.depth.chooser.choice = change(SMALL, tau=1.0)
    assert (free_depths(model, ids) == 1).all() and (scores[-1].sigmoid() == 1).all()
    known = torch.tensor([[1, 2, 1, 2, 2, 1, 1]] * 2)
    assert torch.equal(read(model, ids, known)[1].depth.passes[0].depths_BL, known)


def test_what_the_decider_sees():
    """States at its layers, embeddings first, then the largest logits in order."""
    model, seen = on("llama", change(SMALL, decider={"layers": (1, 0)})), []
    model.depth.chooser.decider.register_forward_pre_hook(lambda module, args: seen.append(args))
    ids = torch.randint(0, 18, (1, 5))
    free_depths(model, ids)
    ((states, top),) = seen
    with torch.no_grad():
        embeds = model.backbone.embed(ids)
        layers = model.backbone(embeds, all_states=True)
    assert torch.equal(states[0], layers[1][0]) and torch.equal(states[1], embeds[0])
    assert torch.equal(top, model.backbone.head(layers[-1])[0].topk(4).values)


# Counting


@pytest.mark.parametrize("settings", [{}, {"max_loops": 3}], ids=["two", "three"])
@by_arch
def test_flops_are_those_of_the_cards_formula(arch, settings, answers):
    """sum of step(s) over readings + mixing + deciding; a reading at depth 2 sees i + #(iterated <= i) keys."""
    model = deciding(arch, change(SMALL, **settings))
    backbone, chooser, limit = model.backbone, model.depth.chooser, model.method.max_loops
    weights, read_out = sum(p.numel() for p in backbone.layers.parameters()), 2.0 * V * backbone.width
    attention = 4 * backbone.n_layers * backbone.width
    for question, one in zip(QUESTIONS, answers(model)):
        asked, written = depths_of(model, question, one)
        depths, total = asked + written, read_out  # the question's last token is read out to decide, and to write
        for i, mine in enumerate(depths):
            for depth in range(1, mine + 1):
                keys = sum(min(other, depth) for other in depths[: i + 1])
                total += 2.0 * weights + attention * keys + (depth > 1) * model.loop.lora.flops
                if i >= len(asked) - 1:
                    total += read_out + (depth < limit) * chooser.decider.flops
            total += (mine - 1) * 2.0 * backbone.width * 4
        total -= (asked[-1] == limit) * read_out  # its last reading is not read out to decide
        assert one.cost.flops == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("at_once", [4096, 5])
@by_arch
def test_no_token_is_read_out_twice_unless_they_are_too_many_to_keep(arch, at_once, monkeypatch):
    model, n_rows = deciding(arch), []
    whole = model.answer_logits(MIXED)
    monkeypatch.setattr(decider, "AT_ONCE", at_once)
    head = model.backbone.lm.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: n_rows.append(len(args[0])))
    for ours, theirs in zip(model.answer_logits(MIXED), whole):
        assert_close(ours, theirs, 1e-10)
    n_read_out, n = sum(n_rows), len(model.batch(model.rows(MIXED)).targets_U)
    n_twice = round(model.loss(MIXED).terms["iterated"].item() * n)
    assert 0 < n_twice < n
    assert n_read_out == n + (n_twice if at_once == 4096 else n)


def test_a_trace_tells_what_each_reading_showed():
    model = on("llama", change(SMALL, iterate="always"))
    first, second = model.loss(MIXED[:2], trace=True).trace.iterations
    assert (first.loop, second.loop, second.rows) == (1, 2, [0, 1]) and first.top_ids is not None
    written = model.generate(QUESTIONS[:2], max_new_tokens=3, trace=True)
    assert [entry.loop for entry in written[1].trace.iterations] == [1, 2]  # the question's own pass


def test_logits_that_are_capped_cannot_be_added_up():
    with pytest.raises(InputError, match="do not add up: set residual_logits to false"):
        tiny_model(SMALL, "gemma2")
    model = tiny_model(change(SMALL, residual_logits=False, iterate="always"), "gemma2")
    assert len(model.generate(QUESTIONS[:1], max_new_tokens=3)) == 1
    assert tiny_model(change(SMALL, max_loops=1), "gemma2").method.residual_logits
