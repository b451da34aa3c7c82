"""The prefix tree against one request at a time, and against float64 log-probabilities of the Hugging Face model."""

import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.engine import Decoder
from steep.eval import Request, Scorer, load_model
from steep.eval.scorer import MIN_SHARED_TOKENS, Node, prefix_tree, tree_tokens

VOCAB = 420


@pytest.fixture(scope="module")
def model(tiny: Path) -> tuple:
    decoder, tokenizer, _ = load_model(tiny)
    return decoder, tokenizer


def requests_with_shared_prefixes(seed: int = 0) -> list[Request]:
    """Few-shot prefix -> questions -> choices of one and of several tokens, some in two sizes, some alone."""
    draw = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(n)]

    requests = []
    for _ in range(2):
        shots = tokens(24)
        for _ in range(4):
            question = shots + tokens(draw.randrange(3, 20))
            requests += [Request(question, [letter]) for letter in tokens(4)]
            stem = tokens(2)
            requests += [Request(question, stem + tokens(n)) for n in (1, 3, 3)]
    requests += [Request(tokens(1), tokens(64)), Request(tokens(5), tokens(9))]
    requests += [requests[3], Request(requests[0].context[:10], requests[0].context[10:13])]
    draw.shuffle(requests)
    return requests


def reference(folder: Path, request: Request) -> tuple[float, bool]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        logprobs = model(ids[:, :-1]).logits[0].log_softmax(-1)[len(request.context) - 1 :]
    targets = torch.tensor(request.continuation)
    return float(logprobs[range(len(targets)), targets].sum()), bool((logprobs.argmax(-1) == targets).all())


def test_equal_to_float64_hugging_face(tiny: Path, model: tuple) -> None:
    requests = requests_with_shared_prefixes()
    for request, score in zip(requests, Scorer(*model).loglikelihood(requests)):
        logprob, greedy = reference(tiny, request)
        assert score.logprob == pytest.approx(logprob, abs=1e-4)
        assert score.is_greedy == greedy


def test_a_mixture_of_experts_is_scored(model: tuple) -> None:
    """Packed, with shared prefixes: each token goes to the experts that it goes to alone."""
    config = dataclasses.replace(
        model[0].config, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    )
    mixture = Decoder(config)
    mixture.init_weights(seed=0, std=0.3)
    requests = requests_with_shared_prefixes()[:20]
    scores = Scorer(mixture, model[1]).loglikelihood(requests)
    mixture.double()
    for request, score in zip(requests, scores):
        context, continuation = request.context, request.continuation
        tokens = torch.tensor([*context, *continuation][:-1])
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        with torch.no_grad():
            hidden = mixture(tokens, torch.arange(len(tokens)), bounds, len(tokens))
            logits = hidden[len(context) - 1 :] @ mixture.head_weight.T
        logprobs = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert score.logprob == pytest.approx(float(logprobs.sum()), abs=1e-4)


def test_greedy_continuation_is_recognised(model: tuple) -> None:
    decoder, _ = model
    context = [0, 5, 9, 30]
    hidden = decoder(torch.tensor(context), torch.arange(4), torch.tensor([0, 4], dtype=torch.int32), 4)
    best = int(decoder.logits(hidden)[-1].argmax())
    scores = Scorer(*model).loglikelihood([(context, [best]), (context, [(best + 1) % VOCAB])])
    assert [score.is_greedy for score in scores] == [True, False]


def test_sharing_changes_rounding_only(model: tuple) -> None:
    requests = requests_with_shared_prefixes()
    plain = Scorer(*model, share_prefixes=False).loglikelihood(requests)
    for batch_tokens, row_chunk in ((8192, 256), (100, 256), (1, 256), (300, 3)):
        shared = Scorer(*model, batch_tokens=batch_tokens, row_chunk=row_chunk).loglikelihood(requests)
        assert [s.logprob for s in shared] == pytest.approx([p.logprob for p in plain], abs=2e-5)
        assert [s.is_greedy for s in shared] == [p.is_greedy for p in plain]


def test_order_of_requests_does_not_change_a_bit(model: tuple) -> None:
    requests = requests_with_shared_prefixes()
    scorer = Scorer(*model, batch_tokens=200)
    expected = dict(zip(map(repr, requests), scorer.loglikelihood(requests)))
    for seed in range(3):
        shuffled = random.Random(seed).sample(requests, len(requests))
        assert [expected[repr(request)] for request in shuffled] == scorer.loglikelihood(shuffled)


def test_shared_tokens_run_once(model: tuple) -> None:
    shots, questions = list(range(40)), [[50, 51], [60, 61, 62], [70]]
    letters = [Request(shots + question, [letter]) for question in questions for letter in (1, 2, 3, 4)]
    assert tree_tokens(prefix_tree(letters)) == 40 + 2 + 3 + 1
    longer = [Request(shots + [50, 51], [5, 6, 7])]  # its input begins with that of the first question
    assert tree_tokens(prefix_tree(letters + longer)) == 40 + 4 + 3 + 1
    assert tree_tokens(prefix_tree(letters, share=False)) == 3 * 40 + 2 + 3 + 1
    ran: list[int] = []
    Scorer(*model).loglikelihood(letters, progress=lambda done, total: ran.extend((done, total)))
    assert ran == [40, 46, 46, 46]


def test_batches_stay_within_the_bound(model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = model
    passes: list[int] = []

    def record(tokens, positions, cu_seqlens, max_seqlen, cache=None):
        passes.append(len(tokens) if cache is None else sum(cache.lengths))
        return type(decoder).forward(decoder, tokens, positions, cu_seqlens, max_seqlen, cache)

    monkeypatch.setattr(decoder, "forward", record)
    Scorer(*model, batch_tokens=130).loglikelihood(requests_with_shared_prefixes())
    assert len(passes) > 3
    assert max(passes) <= 130


short = st.lists(st.integers(0, 2), min_size=1, max_size=6)
with_stem = st.builds(lambda stem, rest: [9] * (stem * MIN_SHARED_TOKENS) + rest, st.integers(0, 2), short)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(Request, with_stem, short), max_size=12), st.booleans())
def test_tree_holds_every_row_once(requests: list[Request], share: bool) -> None:
    """Each continuation token of each request belongs to exactly one row, whose path spells the tokens before it."""
    found: list[tuple[int, int, int, tuple[int, ...]]] = []

    def walk(node: Node, before: list[int]) -> None:
        path = before + node.tokens[node.start : node.end].tolist()
        assert len(before) == node.start
        assert path == node.tokens[: node.end].tolist()
        for rows, targets, owners in zip(node.rows, node.targets, node.requests):
            for row, target, owner in zip(rows, targets, owners):
                assert node.start <= row < node.end
                found.append((int(owner), int(row), int(target), tuple(path[: row + 1])))
        for child in node.children:
            walk(child, path)

    for root in prefix_tree(requests, share):
        walk(root, [])
    expected = [
        (number, len(context) - 1 + i, token, (*context, *continuation[:i]))
        for number, (context, continuation, _) in enumerate(requests)
        for i, token in enumerate(continuation)
    ]
    assert sorted(found) == sorted(expected)


def test_no_requests(model: tuple) -> None:
    assert Scorer(*model).loglikelihood([]) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "0 context"),
        (Request([1], []), "0 continuation"),
        (Request([1] * 60, [1] * 6), "65 tokens exceeds max_length 64"),
        (Request([1, 424], [1]), "token 424 is outside"),
        (Request([1], [-1]), "outside"),
    ],
)
def test_bad_requests_are_refused_before_any_work(model: tuple, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(*model).loglikelihood([Request([1], [2]), request_])


def test_max_length_beyond_the_model(model: tuple) -> None:
    with pytest.raises(ValueError, match="max_length: 65"):
        Scorer(*model, max_length=65)


def test_tokenizer_larger_than_the_model(tiny: Path) -> None:
    decoder, tokenizer, _ = load_model(tiny)
    tokenizer.vocab_size = 425
    with pytest.raises(ValueError, match="425 tokens, the model only 424"):
        Scorer(decoder, tokenizer)


def test_broken_weights_are_noticed(tiny: Path) -> None:
    decoder, tokenizer, _ = load_model(tiny)
    with torch.no_grad():
        decoder.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="1 of 1"):
        Scorer(decoder, tokenizer).loglikelihood([Request([1], [2])])


def test_bfloat16_is_scored_in_fp32(tiny: Path) -> None:
    """Log-probabilities of a bf16 model are not rounded to bf16: letters that it tells apart are not tied."""
    decoder, tokenizer, _ = load_model(tiny, dtype=torch.bfloat16)
    scores = Scorer(decoder, tokenizer).loglikelihood([Request([0, 7], [letter]) for letter in range(200)])
    values = np.array([score.logprob for score in scores])
    rounded = torch.tensor(values).bfloat16().double().numpy()
    assert np.abs(values - rounded).max() > 1e-3
    assert len(set(values)) > len(set(rounded))
    assert all(a.logprob <= 0 for a, _ in itertools.pairwise(scores))
