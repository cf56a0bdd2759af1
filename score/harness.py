"""Our model and tokenizer as EleutherAI's lm-evaluation-harness asks them.

How a request becomes tokens is the harness's way with Hugging Face models, so that log-probabilities are those of
`transformers` on the same folder: context and continuation are encoded together and cut where the context alone ends; what
is too long loses its beginning; a text with nothing before it follows end-of-text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.errors import UserError
from pipeline.log import ProgressReport
from pipeline.model.decoder import Decoder
from pipeline.vocabulary.tokenizer import END_OF_TEXT, Tokenizer
from score.loss import Scorer

# (the request's own text, tokens of the context, tokens of the continuation), as the harness hands them on.
TokenRequest = tuple[tuple[str, str], list[int], list[int]]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Generation:
    """One text to be written: what it goes on from, and where it ends."""

    prompt: list[int]
    until: list[str]
    max_new_tokens: int


class HarnessModel(TemplateLM):  # type: ignore[misc] # the harness has no types
    """What the harness knows as a model. Every rank gets all requests, takes batches in turn, and returns all answers."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.scorer, self.tokenizer, self.world = scorer, tokenizer, scorer.world

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.scorer.model, self.scorer.batch_size, self.scorer.dtype)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(string).tolist()
        except ValueError as error:
            raise UserError(f"the tokenizer refuses a text of the task ({error}): leave that task out") from None
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of each text all tokens, the first from end-of-text, in windows that each give as much context as there is room."""
        windows: list[TokenRequest] = []
        owners = []
        for number, text in enumerate(request.args[0] for request in requests):
            ids = self.tok_encode(text)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.scorer.block_size, context_len=1):
                windows.append((("", text), *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        return totals

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_options: Any) -> list[tuple[float, bool]]:
        """For each request the log-probability of its continuation, and whether it is the likeliest, token by token."""
        for (_, text), _, continuation in requests:
            if not 0 < len(continuation) <= self.scorer.block_size:
                raise UserError(
                    f"a task asks for the probability of {text[:50]!r}, which has {len(continuation)} tokens of its own: "
                    f"wanted 1 to {self.scorer.block_size}, the model's block_size"
                )
        # Sequences of like length fill a batch with little padding, and the largest batch comes first.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]), reverse=True)
        return self._share(self._batches(order), lambda batch: self._score([requests[i] for i in batch]))

    @torch.inference_mode()
    def _score(self, requests: list[TokenRequest]) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-self.scorer.block_size - 1 :] for _, context, continuation in requests]
        lengths = [len(continuation) for _, _, continuation in requests]
        ids = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.long)  # behind a text nothing sees the zeros
        where = torch.zeros_like(ids, dtype=torch.bool)
        for row, length, own_ids, own_where in zip(rows, lengths, ids, where, strict=True):
            own_ids[: len(row) - 1] = torch.tensor(row[:-1])
            own_where[len(row) - 1 - length : len(row) - 1] = True
        device = self.world.device
        targets = torch.tensor([token for _, _, continuation in requests for token in continuation], device=device)
        logits = self.scorer.logits(ids.to(device), where.to(device))
        losses = F.cross_entropy(logits, targets, reduction="none").cpu().double()
        likeliest = (logits.argmax(dim=-1) == targets).cpu()
        return [
            (-float(loss.sum()), bool(hits.all()))
            for loss, hits in zip(torch.split(losses, lengths), torch.split(likeliest, lengths), strict=True)
        ]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The likeliest token each time, until a text the task names, end-of-text, or as many tokens as it allows."""
        asked = [self._generation(*request.args) for request in requests]
        alike: dict[tuple[int, int], list[int]] = {}
        for number, generation in enumerate(asked):
            # Prompts of one length need no padding, which positions that count from 0 have no place for.
            alike.setdefault((len(generation.prompt), generation.max_new_tokens), []).append(number)
        batches = [batch for numbers in alike.values() for batch in self._batches(numbers)]
        return self._share(batches, lambda batch: self._generate([asked[i] for i in batch]))

    def _generation(self, context: str, options: dict[str, Any]) -> Generation:
        options = {**normalize_gen_kwargs(options, DEFAULT_MAX_GEN_TOKS)}
        if options["do_sample"]:
            raise UserError("a task draws its answers at random (do_sample), here the likeliest is taken: leave it out")
        room = self.scorer.block_size - options["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"a task asks for {options['max_gen_toks']} new tokens, the model's block_size is {self.scorer.block_size}: "
                "wanted fewer, as generation_kwargs.max_gen_toks in the task, or a model with a longer context"
            )
        prompt = self.tok_encode(context)[-room:] or [self.eot_token_id]
        return Generation(prompt, handle_stop_sequences(options["until"], END_OF_TEXT), options["max_gen_toks"])

    @torch.inference_mode()
    def _generate(self, asked: list[Generation]) -> list[str]:
        unused = self.scorer.batch_size - len(asked)
        prompts = [generation.prompt for generation in asked]
        logits = self.decoder.prefill(torch.tensor(prompts + prompts[-1:] * unused, device=self.world.device))
        written: list[list[int]] = [[] for _ in asked]
        texts = [""] * len(asked)
        growing = set(range(len(asked)))
        for _ in range(asked[0].max_new_tokens):
            chosen = logits.argmax(dim=-1)
            tokens = chosen.tolist()
            growing = {row for row in growing if tokens[row] != self.eot_token_id}
            for row in tuple(growing):
                written[row].append(tokens[row])
                texts[row] = self.tokenizer.decode_bytes(written[row]).decode(errors="replace")
                if any(stop in texts[row] for stop in asked[row].until if stop):
                    growing.discard(row)
            if not growing:
                break
            logits = self.decoder.step(chosen)
        return [
            postprocess_generated_text(text, generation.until, None)
            for text, generation in zip(texts, asked, strict=True)
        ]

    def _batches(self, numbers: list[int]) -> list[list[int]]:
        size = self.scorer.batch_size
        return [numbers[at : at + size] for at in range(0, len(numbers), size)]

    def _share(self, batches: list[list[int]], answer: Callable[[list[int]], list[Answer]]) -> list[Answer]:
        """The answers to all requests in their order: each rank works out those of its batches, and gets the others'."""
        own: dict[int, Answer] = {}
        error = ""
        try:
            with ProgressReport("tasks", len(batches), "batches") as progress:
                for batch in batches[self.world.rank :: self.world.size]:
                    own |= zip(batch, answer(batch), strict=True)
                    progress.advance(self.world.size)
        except UserError as raised:
            error = str(raised)
        for said in filter(None, self.world.gather(error)):
            raise UserError(said)  # on every rank, the one that tells the user among them
        every = {number: given for part in self.world.gather(own) for number, given in part.items()}
        return [every[number] for number in sorted(every)]
