"""`LatentModel`: a decoder that reasons by a method, as users have it: it learns, answers, is saved and loaded.

model = LatentModel.from_pretrained("HuggingFaceTB/SmolLM2-135M", method=Coconut())
model.loss(examples).loss.backward()
model.generate(["How many legs have 3 cats?"])[0].text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self, Unpack

from innerloop.checks.arguments import checked
from innerloop.checks.values import ONE_BY_ONE, Seed, Some
from innerloop.config.method import Method
from innerloop.engine.generate import generate
from innerloop.engine.generation import Generation
from innerloop.engine.options import Answering
from innerloop.model import loading
from innerloop.model.hub import check_repo, push
from innerloop.model.model import LatentCore
from innerloop.model.run_folder import RUN_CHECKPOINT
from innerloop.text.examples import Example
from innerloop.text.tokenizer import train_tokenizer


class LatentModel(LatentCore):
    """Any decoder that reasons by any method."""

    @checked
    def generate(
        self,
        questions: Annotated[Sequence[str], ONE_BY_ONE],
        *,
        steps: Sequence[Sequence[str]] | None = None,
        begun: Sequence[Sequence[str]] | None = None,
        places: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        strict: bool = True,
        **options: Unpack[Answering],
    ) -> list[Generation]:
        """Answer questions, in the order given.

        Args:
            questions: the questions.
            steps: the gold steps of each question, where known: a trace then has the ranks of their tokens.
            begun: what each answer has begun with and goes on from: steps, and ``###`` last where the answer is to come
                at once.
            places: the place of each question among all, where these are a part of them, as draws depend on it.
            progress: called with the number of questions answered since the last call.
            strict: refuse them all if one cannot be answered; otherwise that one alone fails, with its reason in
                ``error``.
            options: max_new_tokens, batch_size, temperature, seed, trace, stage, loops, max_positions, samples, beams,
                likelihoods and replayable; see `innerloop.engine.options.EngineOptions`.
        """
        return generate(
            self, questions, steps=steps, begun=begun, places=places, progress=progress, strict=strict, **options
        )

    @classmethod
    @checked
    def from_pretrained(
        cls, path: str | Path, method: Method | None = None, **options: Unpack[loading.Loading]
    ) -> Self:
        """Load a saved run, open released weights of a known format, or put a method on any Hugging Face model.

        Args:
            path: a folder or a Hub name.
            method: how to reason. None: as the folder says. With a saved folder, another method starts from its
                weights.
            options: lora, dtype, device, marker_init, trust_remote_code, chat, attn_implementation, revision, token,
                cache_dir and local_files_only; see `innerloop.model.loading.load`.
        """
        return loading.load(cls, path, method, **options)

    @checked
    def push_to_hub(
        self, repo: str, *, private: bool | None = None, token: str | None = None, run: str | Path | None = None
    ) -> str:
        """Share the model on the Hugging Face Hub with a card, in one commit; return its address.

        Args:
            repo: OWNER/NAME; made if it is not there.
            private: make it private where it is made; None: as the Hub does.
            token: of the Hub; None: the one that ``hf auth login`` or HF_TOKEN has given.
            run: the folder of the run that this model is, whose results, controls and recipe the card tells.

        Raises:
            InputError: the Hub refuses it, or the way there broke; what was uploaded is not sent again.
        """
        check_repo(repo)
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / RUN_CHECKPOINT)
            return push(Path(folder) / RUN_CHECKPOINT, repo, private=private, token=token, told_of=run)

    def beside(self, path: str | Path) -> Self:
        """Load a run that has frozen this model's decoder onto it, so that both are at hand; see `load_beside`.

        Streams are switched so at run time: ``narrow.beside("runs/p4")`` has four where ``narrow`` has two.
        """
        return loading.load_beside(self, path)

    @classmethod
    @checked
    def from_scratch(
        cls,
        settings: Mapping[str, Any],
        examples: Some[Example],
        method: Method,
        seed: Seed = 0,
    ) -> Self:
        """Make a backbone with fresh weights and a word tokenizer trained on the text of examples.

        Args:
            settings: ``type`` (a transformers model type such as llama or gpt2) and fields of its configuration.
            examples: whose words the tokenizer learns.
            method: how to reason.
            seed: of the initial weights.
        """
        return loading.from_scratch(cls, settings, train_tokenizer(examples), method, seed)
