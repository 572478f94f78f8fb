"""The passes of a method as its paper writes them, slowly: the bare Hugging Face model, everything read anew each time.

No cache, no padding, no context of the library's: each iteration reads question and latents from their embeddings, each
written token reads all that came before it. What happens between two passes (timestep embedding, rescaling, residual)
is the model's own `InnerLoop`; what is left to be compared is how passes are made.

Shapes: `B` rows of one length, `L` positions, `N` latents, `D` width.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop.engine.latent_model import LatentModel
from innerloop.text.examples import Example
from innerloop.text.row import Span


class FullPass:
    """f over the latents: reads what comes before them once more."""

    compacts = False
    state_mask = before = row_info = None

    def __init__(self, model: LatentModel, before_BLD: Tensor, grows: bool):
        self.decoder, self.before_BLD, self.grows = model.backbone.decoder, before_BLD, grows
        self.inputs_BND: Tensor | None = None
        self.positions = 0  # read so far in all iterations, for one row

    def __call__(self, inputs_BND: Tensor, loop: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return u (B, N, D)."""
        read_BLD = torch.cat([self.before_BLD, inputs_BND], dim=1)
        self.inputs_BND = inputs_BND
        self.positions += read_BLD.shape[1]
        if self.grows:
            self.before_BLD = read_BLD
        return self.decoder(inputs_embeds=read_BLD, use_cache=False).last_hidden_state[:, -inputs_BND.shape[1] :]


class Reference:
    """A slow twin of a model, with its weights; for slots, appended latents and written steps."""

    def __init__(self, model: LatentModel):
        method, settings = model.method, model.method.loop
        if settings.shift or settings.lora != "none" or settings.site != "post_norm" or model.depth:
            raise SystemExit(f"the reference does not know this kind of '{method.name}'")
        self.model, self.method, self.lm = model, method, model.backbone.lm
        self.positions = 0  # read so far for all questions

    def embed(self, rows: list[list[Span]]) -> Tensor:
        """Return the embeddings (B, L, D) of pieces of one length."""
        ids = [[i for span in spans for i in span.ids] for spans in rows]
        return self.model.backbone.embed(torch.tensor(ids, dtype=torch.long, device=self.model.device))

    def think(self, asked: list[str]) -> Tensor:
        """Return the embeddings (B, L, D) of all that is read before the first written token."""
        rows, loop = self.model.prompts(asked), self.model.loop
        prefix, suffix = self.embed([row.prefix for row in rows]), self.embed([row.suffix for row in rows])
        if not rows[0].region:
            return torch.cat([prefix, suffix], dim=1)
        region, n_loops = self.embed([row.region for row in rows]), [row.n_loops for row in rows]
        grows = self.method.plan.scope == "append"
        f = FullPass(self.model, prefix, grows)
        state = region[:, :1] if grows else region
        if self.method.plan.first_state == "forward":
            ends = FullPass(self.model, prefix[:, :-1], False) if grows else f
            state = loop.feed_back(ends(prefix[:, -1:] if grows else region, 0), None)
            self.positions += ends.positions if grows else 0
        result = loop(f, state, n_loops) if max(n_loops) else None
        self.positions += f.positions
        state = state if result is None else result.state
        if self.method.plan.answer_context == "refeed":
            return torch.cat([f.before_BLD, state, suffix], dim=1)
        if grows:
            return torch.cat([f.before_BLD, suffix], dim=1)
        assert f.inputs_BND is not None
        return torch.cat([prefix, f.inputs_BND, suffix], dim=1)

    @torch.no_grad()
    def write(self, question: str, n_tokens: int) -> str:
        """Answer one question with ``n_tokens`` tokens, each the likeliest, reading everything anew for each."""
        read_1LD, ids, never = self.think([question]), [], self.model.suppressed_ids()
        for _ in range(n_tokens):
            self.positions += read_1LD.shape[1]
            logits_V = self.lm(inputs_embeds=read_1LD, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            logits_V[never] = -torch.inf
            ids.append(logits_V.argmax())
            read_1LD = torch.cat([read_1LD, self.model.backbone.embed(ids[-1][None, None])], dim=1)
        return self.model.tokenizer.decode(torch.stack(ids).tolist(), skip_special_tokens=True)

    def loss(self, examples: list[Example]) -> Tensor:
        """Return the mean loss of the written tokens of examples whose rows have one length."""
        stage = self.method.last_stage
        rows = [self.method.lay_out(example, self.model.encoder, stage) for example in examples]
        n_read = len(self.method.prompt(examples[0].question, self.model.encoder, stage))
        before = self.think([example.question for example in examples])
        ids = torch.tensor([row.ids()[n_read:] for row in rows], device=self.model.device)
        read_BLD = torch.cat([before, self.model.backbone.embed(ids)], dim=1)
        states = self.model.backbone.decoder(inputs_embeds=read_BLD, use_cache=False).last_hidden_state
        logits = self.model.backbone.head(states[:, before.shape[1] - 1 : -1])
        return cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
