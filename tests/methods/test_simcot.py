"""SIM-CoT on both hosts against brute force, and its invariants in the order of its card (simcot.md, section 9).

1. Without weight it is the host, with the same draws. 2. A probe leaves the host's gradients alone, bit for bit.
3. Answers are those of the host. 4. A text prefix and the base's weights give the base's loss. 5. The first token is
told by the last latent of its group. 6. There are as many targets as tokens and ends, none without steps. 7. A batch of
groups is a loop over groups. 8. L_k reaches <bot>, and no latent after group k. 9. LOTUS-aux is the same function.
10. Latents stay further apart (test_simcot_decoder.py).
"""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import Coconut, Example
from innerloop.methods import Codi, Lotus, SimCot, SimCotCodi
from innerloop.model import step_decoder
from innerloop.model.step_decoder import aux_loss
from innerloop.text.row import FED
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    by_arch,
    change,
    gradients,
    on,
    rows_at,
    same_weights,
    states,
)

ON_COCONUT = SimCot(curriculum={"max_stage": 3}, latents_per_step=2)
ON_CODI = SimCotCodi(n_latents_total=3, answer_weight=0.0, hid={"weight": 0.0, "teacher": None}, teacher_weight=0.0)
HOSTS = {"coconut": ON_COCONUT, "codi": ON_CODI}
WHOLE = {"coconut": ON_COCONUT, "codi": SimCotCodi(n_latents_total=3)}
PLAIN = {"coconut": Coconut(curriculum={"max_stage": 3}, latents_per_step=2), "codi": Codi(n_latents_total=3)}
LAST = 4
STAGES = [4, 2, 1, 3, 4, 1]
by_host = pytest.mark.parametrize("host", HOSTS)
by_norm = pytest.mark.parametrize("norm", ["per_row", "token_mean"])
by_surplus = pytest.mark.parametrize("surplus", ["answer", "ignore", "repeat_last"])


class Slow(Reference):
    """The auxiliary loss as the card writes it: one group at a time, with the bare model."""

    def __init__(self, model):
        super().__init__(model)
        self.model, self.is_codi = model, isinstance(self.method, SimCotCodi)
        self.c = 1 if self.is_codi else self.method.latents_per_step
        self.aux = model.backbone.lm if model.step_decoder.own is None else model.step_decoder.own.lm

    def latents(self, example, stage) -> list[torch.Tensor]:
        """z_1, z_2, .. (D,): what is fed; with CODI one more, that would be fed next."""
        x_LD = self.embed([*self.question(example.question), *self.marker("<bot>")])
        m = self.method
        for _ in range(m.n_latents_total + 1 if self.is_codi else min(stage, m.max_stage) * self.c):
            h_1D = self.read(x_LD)[0][-1:]
            x_LD = torch.cat([x_LD, self.soft(self.model.loop.rescale(h_1D) if self.is_codi else h_1D)])
        return list(x_LD[len(self.question(example.question)) + 1 :])

    def soft(self, z_1D: torch.Tensor) -> torch.Tensor:
        """z' = alpha z + beta E^T softmax(W z)."""
        table, head = self.lm.get_input_embeddings().weight, self.lm.get_output_embeddings().weight
        p_1V = (z_1D @ head.T).softmax(-1)
        return self.method.soft_alpha * z_1D + self.method.soft_beta * (p_1V @ table)

    def texts(self, example, stage) -> list[str]:
        """What group k must tell; the last one all that are left: of no written steps, or of all but CODI's last."""
        m, steps = self.method, list(example.steps)
        n, between = (m.n_latents_total + 1, " ") if self.is_codi else (min(stage, m.max_stage), "\n")
        if self.is_codi or stage <= m.max_stage:
            del steps[-1 if self.is_codi else stage :]
        groups = [*steps[: n - 1], between.join(steps[n - 1 :])] if len(steps) > n else steps
        more = {"answer": f"### {example.answer}", "ignore": "", "repeat_last": ["", *groups][-1]}[m.surplus]
        return [*groups, *[more] * (n - len(groups))]

    def told(self, z_cD: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """The summed loss of one group."""
        words = self.aux if self.method.aux.embed == "own" else self.lm
        x_LD = torch.cat([z_cD, words.get_input_embeddings()(torch.tensor(ids[:-1], dtype=torch.long))])
        at = self.method.aux.position + torch.arange(len(x_LD))[None]
        lora = self.model.step_decoder.lora
        with nullcontext() if lora is None else lora.at(1):
            logits = self.aux(inputs_embeds=x_LD[None], position_ids=at, use_cache=False).logits[0]
        return cross_entropy(logits[self.c - 1 :], torch.tensor(ids), reduction="sum")

    def loss(self, examples, stages=None):
        """L_step; G_eff of CODI are the groups that tell something, on Coconut all."""
        groups, pairs, c = {}, list(zip(examples, stages or [LAST] * len(examples))), self.c
        for example, stage in pairs:
            z = self.latents(example, stage)
            for k, text in enumerate(self.texts(example, stage)):
                if text:
                    ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
                    groups.setdefault(k, []).append((self.told(torch.stack(z[k * c : k * c + c]), ids), len(ids)))
        is_per_row = self.method.aux.norm == "per_row"
        totals = [
            sum(loss for loss, _ in found) / (len(found) if is_per_row else sum(n for _, n in found))
            for found in groups.values()
        ]
        return sum(totals) / (len(totals) if self.is_codi else max(len(self.texts(*pair)) for pair in pairs))


def aux_of(model, rows):
    """The auxiliary term of rows, as a loss."""
    batch = model.batch(rows)
    thought = model.think(batch)
    model.written_logits(batch, thought)
    return aux_loss(model.loss_inputs(batch, thought), model.step_decoder, model.loop)


def assert_told_as_brute_force_tells(model, stages=None):
    """The term and its gradients are those of a loop over rows and groups."""
    rows = rows_at(model, MIXED, stages or [model.method.last_stage] * len(MIXED))
    expected = Slow(model).loss(MIXED, stages)
    assert model(model.batch(rows)).terms["aux"].item() == pytest.approx(expected.item(), rel=1e-6)
    found, expected = gradients(model, aux_of(model, rows)), gradients(model, expected)
    if "backbone.lm.model.embed_tokens.weight" in expected:  # an embedding gives its padding row no gradient
        expected["backbone.lm.model.embed_tokens.weight"][model.encoder.pad_id] = 0
    assert_same_gradients(found, expected, 1e-5)


# The loss against brute force


@by_arch
@by_norm
@by_surplus
@pytest.mark.parametrize(("host", "stages"), [("coconut", None), ("coconut", STAGES), ("codi", None)])
def test_7_the_loss_is_that_of_a_loop_over_rows_and_groups(host, stages, surplus, norm, arch):
    assert_told_as_brute_force_tells(on(arch, change(HOSTS[host], surplus=surplus, aux={"norm": norm})), stages)


@by_arch
@by_host
@pytest.mark.parametrize(
    "aux", [{"embed": "own"}, {"position": 0}, {"position": 5}, {"layers": 1}, {"lora_rank": 2}], ids=str
)
def test_7_every_decoder_is_brute_forces(aux, host, arch):
    assert_told_as_brute_force_tells(on(arch, change(HOSTS[host], aux=aux)))


@by_arch
@by_host
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.7), (0.6, 0.4), (0.5, 0.0)])
@pytest.mark.slow
def test_latents_may_be_mixed_with_the_words_that_they_show(alpha, beta, host, arch):
    """In what is told, in the answer, and when answering, with the words' embeddings and head in the gradient."""
    model = on(arch, change(HOSTS[host], soft_alpha=alpha, soft_beta=beta))
    slow = Slow(model)
    assert_told_as_brute_force_tells(model)
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            fed = slow.latents(example, LAST)[: 3 if host == "codi" else 6]
            asked = slow.embed([*slow.question(example.question), *slow.marker("<bot>")])
            thought = torch.cat([asked, torch.stack(fed), slow.embed(slow.marker("<eot>"))])
            assert_close(logits, slow.logits_after(thought, slow.answer(example)), ROUNDED)
    together = model.generate(QUESTIONS, max_new_tokens=5)
    assert [g.text for g in together] == [model.generate([q], max_new_tokens=5)[0].text for q in QUESTIONS]
    twin = copy.deepcopy(model)
    assert twin.loop.words is twin.backbone and not any("words" in name for name in model.state_dict())


@by_arch
def test_the_whole_loss_is_the_hosts_and_the_weighted_term(arch):
    model = on(arch, change(ON_COCONUT, aux={"weight": 0.3}))
    expected = Reference(same_weights(model, PLAIN["coconut"])).loss(MIXED) + 0.3 * Slow(model).loss(MIXED)
    output = model.loss(MIXED)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(gradients(model, output.loss), gradients(model, expected), 1e-5)


@pytest.mark.parametrize("loop", [{"residual": "A"}, {"residual": "B"}, {"residual": "sum"}, {"rescale": "rms"}])
def test_the_latent_after_codis_last_is_made_as_the_others_are(loop):
    """z_(k+1) of k latents is the last latent of k + 1: what one more pass would feed."""
    model = on("gpt2", change(ON_CODI, n_latents_total=2, loop=loop))
    longer = same_weights(model, change(model.method, n_latents_total=3))
    groups = []
    for twin in (model, longer):
        batch = twin.batch(twin.rows(MIXED[:1] * 2))
        thought = twin.think(batch)
        twin.written_logits(batch, thought)
        places = {"rows_G": torch.tensor([0, 0, 0]), "first_G": torch.tensor([0, 1, 2]), "n_latents": 1}
        sites = dataclasses.replace(batch.aux_targets[0], **places)
        groups.append(step_decoder.group_latents(twin.loss_inputs(batch, thought), twin.loop, sites))
    assert_close(*groups)


@by_host
def test_1_without_weight_it_is_the_host(host):
    """The same loss, gradients and draws, in training with dropout."""
    model = on("gpt2", change(WHOLE[host], aux={"weight": 0.0}))
    found = []
    for twin in (model, same_weights(model, PLAIN[host])):
        torch.manual_seed(3)
        out = twin.train().loss(MIXED)
        found.append((out.loss, gradients(twin, out.loss), torch.get_rng_state()))
    (loss, grads, draws), (other_loss, other_grads, other_draws) = found
    assert loss == other_loss and torch.equal(draws, other_draws) and grads.keys() == other_grads.keys()
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


@by_arch
@by_host
@pytest.mark.parametrize("embed", ["base", "own"])
def test_2_a_probe_leaves_the_hosts_gradients_alone(embed, host, arch):
    model = on(arch, change(WHOLE[host], aux={"detach": True, "embed": embed}))
    theirs = same_weights(model, PLAIN[host])
    grads, expected = gradients(model, model.loss(MIXED).loss), gradients(theirs, theirs.loss(MIXED).loss)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    learning = same_weights(model, change(model.method, aux={"detach": False}))
    attached = gradients(learning, learning.loss(MIXED).loss)
    aux = [name for name in grads if name.startswith("step_decoder")]
    assert all(torch.equal(grads[name], attached[name]) for name in aux)
    assert max(grads[name].abs().max().item() for name in aux) > 1e-3
    assert any(not torch.equal(attached[name], expected[name]) for name in expected)


@by_arch
@by_host
def test_3_answers_are_those_of_the_host(host, arch):
    model = on(arch, HOSTS[host])
    theirs = same_weights(model, PLAIN[host])
    for one, other in zip(model.generate(QUESTIONS, max_new_tokens=8), theirs.generate(QUESTIONS, max_new_tokens=8)):
        assert (one.text, one.cost.passes, one.cost.positions) == (other.text, other.cost.passes, other.cost.positions)
    for one, other in zip(model.answer_logits(MIXED), theirs.answer_logits(MIXED)):
        assert torch.equal(one, other)


@by_arch
@pytest.mark.parametrize("n_prefix", [1, 4])
def test_4_a_text_prefix_and_the_bases_weights_give_the_bases_loss(n_prefix, arch):
    model = on(arch, change(ON_COCONUT, aux={"position": 0}), stirred=False)
    ids = torch.tensor([model.tokenizer.encode("3 + 4 = 2 ; * 1 - 0")])
    prefix, text = ids[:, :n_prefix], ids[:, n_prefix:]
    logits = model.step_decoder(model.backbone.embed(prefix), text, model.backbone)
    assert_close(logits, model.backbone.lm(ids).logits[:, n_prefix - 1 : -1], ROUNDED)  # 5: index c - 1 tells the first


def test_5_padding_tells_nothing_and_changes_nothing():
    model = on("gpt2", ON_COCONUT)
    latents, ids = torch.randn(1, 1, 32, dtype=torch.double), torch.tensor([[5, 6, 7]])
    logits = model.step_decoder(latents, ids, model.backbone)
    assert logits.shape[:2] == (1, 3)
    padded = model.step_decoder(latents, torch.tensor([[5, 6, 7, 0, 0]]), model.backbone)
    assert_close(padded[:, :3], logits)
    assert_close(model.step_decoder(latents, ids[:, :1], model.backbone), logits[:, :1])


@pytest.mark.parametrize("m", range(6))
def test_6_targets_are_the_steps_tokens_and_their_ends(m):
    """m steps for G = 3 groups: none too few, as many, or more, which the last group takes together."""
    model = on("gpt2", change(ON_COCONUT, surplus="ignore"))
    texts = ("3 + 4 = 2", "2 * 2", "4", "1 - 1 = 0", "0 + 0")[:m]
    (row,) = model.rows([Example("3 ; + 4", texts, "2")])
    groups = [*texts[:2], "\n".join(texts[2:])] if m > 3 else texts
    ids = [(*model.tokenizer.encode(text, add_special_tokens=False), model.encoder.eos_id) for text in groups]
    assert [told.ids for told in row.aux_targets] == ids + [()] * (3 - len(ids))
    assert [(t.group, t.iteration, t.first, t.n_latents) for t in row.aux_targets] == [
        (k, FED, 2 * k, 2) for k in range(3)
    ]
    assert sum((sites.targets_GL >= 0).sum().item() for sites in model.batch([row]).aux_targets) == sum(map(len, ids))


STEPS = ("<<12*2=24>>", "<<24-5=19>>", "<<19+3=22>>")


@pytest.mark.parametrize(
    ("method", "stage", "told"),
    [
        (SimCot(latents_per_step=1, curriculum={"max_stage": 2}), 1, STEPS[:1]),
        (SimCot(latents_per_step=1, curriculum={"max_stage": 2}), 2, STEPS[:2]),  # the third is still written
        (SimCot(latents_per_step=1, curriculum={"max_stage": 2}), 3, (STEPS[0], "<<24-5=19>>\n<<19+3=22>>")),
        (SimCot(latents_per_step=1, curriculum={"max_stage": 4}), 5, (*STEPS, "### 22")),
        (SimCotCodi(n_latents_total=2), 0, STEPS[:2]),
        (SimCotCodi(n_latents_total=1), 0, STEPS[:2]),
    ],
)
def test_6_steps_are_told_as_the_authors_tell_them(method, stage, told):
    """With << and >>, each by the group of its own, several as lines (Coconut) or words (CODI) of one text."""
    model = on("gpt2", method)
    (row,) = model.rows([Example("3 ; + 4", STEPS, "22")], stage)
    assert [target.ids for target in row.aux_targets] == [model.encoder.aux_target(text) for text in told]
    assert method.aux.position == 1


def test_6_codis_last_step_is_told_by_none_and_steps_told_together_are_one_line():
    model = on("gpt2", SimCotCodi(n_latents_total=1))
    (row,) = model.rows([Example("3 ; + 4", (*STEPS, "<<22+1=23>>"), "23")])
    told = [model.encoder.aux_target(text) for text in (STEPS[0], "<<24-5=19>> <<19+3=22>>")]
    assert [target.ids for target in row.aux_targets] == told


@by_host
def test_6_nothing_is_told_where_there_are_no_steps(host):
    model = on("gpt2", change(HOSTS[host], surplus="ignore"))
    stepless = [example for example in MIXED if not example.steps]
    out = model.loss(stepless)
    assert "aux" not in out.terms and torch.isfinite(out.loss)
    assert torch.isfinite(model.loss(MIXED).terms["aux"])


@by_host
def test_8_a_group_reaches_bot_and_nothing_after_it(host):
    """seen[j] shows latent j + 1: it learns from groups at it and after it alone."""
    fields = {"latents_per_step": 1} if host == "coconut" else {"surplus": "repeat_last"}
    model = on("gpt2", change(HOSTS[host], **fields))
    n_groups = {"coconut": 3, "codi": 4}[host]
    for k in range(n_groups):
        rows = model.rows(MIXED[3:4])
        rows[0].aux_targets = [told for told in rows[0].aux_targets if told.group == k]
        with states(model) as seen:
            aux_of(model, rows).backward()
        reached = [h.grad is not None and bool(h.grad.abs().max() > 0) for h in seen]
        assert reached[: k + 1] == [True] * (k + 1) and not any(reached[k + 1 :])
        assert seen[0].grad[0, -1].abs().max() > 0  # <bot>
    model.zero_grad()


def test_9_lotus_aux_is_the_same_function(monkeypatch):
    """On the same vectors and tokens, with one group, so that all tokens count alike."""
    examples = [example for example in MIXED if example.steps]
    vectors = torch.randn(len(examples), 2, 32, dtype=torch.double)
    monkeypatch.setattr(step_decoder, "group_latents", lambda inputs, loop, sites: vectors[sites.rows_G])
    mine = on(
        "gpt2", SimCot(curriculum={"max_stage": 1}, latents_per_step=2, aux={"norm": "token_mean", "position": 0})
    )
    lotus = same_weights(mine, Lotus(n_blocks=1, latents_per_block=2, step_weight=0.0, aux={"weight": 1.0}))
    rows = mine.rows(examples)
    for row, example in zip(rows, examples):
        row.aux_targets = [dataclasses.replace(row.aux_targets[0], ids=mine.encoder.step(example.steps[0], 0).ids)]
    assert mine(mine.batch(rows)).terms["aux"].item() == pytest.approx(lotus.loss(examples).terms["aux"].item())
