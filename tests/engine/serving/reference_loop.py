"""What each request has to give: one sequence at a time, its whole context read anew for every token, nothing shared with a scheduler."""

import random

from jaxmoe.engine.serving.simulated import SimRequest, SimResult
from jaxmoe.engine.serving.virtual import extend, next_token


def expected_tokens(request: SimRequest, answer: int = 0) -> tuple[int, ...]:
    """New tokens of the k-th answer to a request."""
    ids = list(request.prompt)
    while len(ids) < len(request.prompt) + request.new:
        context = 0
        for token in ids:
            context = extend(context, token)
        ids.append(next_token(context, request.seed + answer, request.vocab))
        if ids[-1] == request.eos:
            break
    return tuple(ids[len(request.prompt) :])


def check_tokens(requests: list[SimRequest], result: SimResult) -> None:
    """Every answer that was not cancelled is there once, and is what it would be alone; nothing is left behind."""
    for request, ids in zip(requests, result.of, strict=True):
        for k, id in enumerate(ids):
            assert (id in result.tokens) != (id in result.cancelled)
            if id in result.tokens:
                assert result.tokens[id] == expected_tokens(request, k), f"sequence {id}"
                assert len(result.times[id]) == len(result.tokens[id])
    for pool in (result.state.pool, result.state.host):
        assert pool.held == 0 and pool.free + pool.cached == pool.pages
    assert result.state.idle and len(result.state.slots) == result.state.spec.slots
    assert not result.state.running and not result.state.swapped and result.state.wave is None and not result.state.users


def some_requests(seed: int, count: int, positions: int, longest_prompt: int, span: float, vocab: int = 50) -> list[SimRequest]:
    """Random ones: many begin alike; some ask for several answers, have priorities, end before their limits, or need the host at each token."""
    rng = random.Random(seed)
    common = [rng.randrange(vocab) for _ in range(positions)]
    out = []
    for i in range(count):
        n = rng.randint(1, longest_prompt)
        alike = rng.randint(0, n)
        prompt = tuple(common[:alike] + [rng.randrange(vocab) for _ in range(n - alike)])
        out.append(SimRequest(
            prompt, rng.randint(1, positions - n), rng.random() * span, i, (0, vocab), rng.choice((1, 1, 1, 3)), rng.choice((None, None, 3)),
            rng.randrange(3), rng.choice("ab"), rng.choice((0, 8)), rng.random() < 0.2,
        ))  # fmt: skip
    return out
