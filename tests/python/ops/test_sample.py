"""vivace::sample and vivace::sampling_probs."""

import numpy as np
import pytest
import torch

from reference.philox import sampling_uniforms
from reference.sampling import distribution, draw

from .cases import OPS, Case, grid

NAMES = ("cfg_weight", "temperature", "repetition_penalty", "min_p", "top_p", "top_k")
SETTINGS = {
    "plain": (0.0, 1.0, 1.0, 0.0, 1.0, 0),
    "chatterbox": (0.5, 0.8, 1.2, 0.05, 1.0, 0),
    "nucleus": (0.3, 0.7, 1.5, 0.0, 0.9, 0),
    "tail": (0.5, 1.3, 1.1, 0.02, 0.95, 0),
    "top_k": (0.0, 1.0, 1.0, 0.0, 1.0, 50),
    "all": (0.5, 0.9, 2.0, 0.03, 0.8, 200),
    "greedy": (0.5, 0.0, 1.2, 0.05, 0.9, 0),
    "one": (0.0, 1.0, 1.0, 0.0, 0.0, 0),
    "top_1": (0.0, 2.0, 1.0, 0.0, 1.0, 1),
    "min_p_1": (0.0, 1.0, 1.0, 1.0, 1.0, 0),
    "wide": (0.0, 1.0, 1.0, 0.0, 1.0, 100000),
}


class Batch:
    """Requests of given settings, each with its own conditional row and, with guidance, an unconditional one."""

    def __init__(self, case, settings, vocab, scale=3.0):
        self.settings, self.device = [SETTINGS[s] for s in settings], case.device
        rows, n = [], 0
        for s in self.settings:
            rows.append((n, n + 1) if s[0] else (n, -1))
            n += 2 if s[0] else 1
        order = torch.randperm(n).tolist()  # rows lie anywhere
        rows = [(order[c], order[u] if u >= 0 else -1) for c, u in rows]
        self.logits = case.randn(n, vocab, scale=scale)
        self.rows = case.int32(rows)
        self.seen = (torch.rand(len(settings), vocab) < 0.1).to(torch.uint8).to(case.device)
        columns = list(zip(*self.settings, strict=True))
        self.parameters = {
            name: torch.tensor(column, dtype=torch.int32 if name == "top_k" else torch.float32, device=case.device)
            for name, column in zip(NAMES, columns, strict=True)
        }
        self.seed = torch.randint(-(2**62), 2**62, (len(settings),)).to(case.device)
        self.step = torch.randint(0, 5000, (len(settings),)).to(case.device)

    def expected(self, r):
        cond, uncond = self.rows[r].tolist()
        logits = self.logits.double().cpu().numpy()
        single = [float(np.float32(x)) for x in self.settings[r][:5]]  # the operator takes float32
        return distribution(
            logits[cond],
            logits[uncond] if uncond >= 0 else None,
            self.seen[r].cpu().numpy(),
            *single,
            self.settings[r][5],
        )

    def probs(self):
        return OPS.sampling_probs(self.logits, self.rows, self.seen, **self.parameters)

    def sample(self):
        return OPS.sample(self.logits, self.rows, self.seen, **self.parameters, seed=self.seed, step=self.step)


@grid("probs", cpu=24, cuda=36, vocab=(1, 5, 100, 1000, 8194, 8193), scale=(1.0, 3.0, 12.0))
def test_probabilities_equal_the_reference(case):
    batch = Batch(case, list(SETTINGS), case.vocab, case.scale)
    seen = batch.seen.clone()
    probs = batch.probs()
    assert probs.dtype == torch.float32 and probs.shape == (len(SETTINGS), case.vocab)
    assert torch.equal(batch.seen, seen), "probabilities must not mark anything"
    judged = 0
    for r in range(len(SETTINGS)):
        exact = batch.expected(r)
        if exact.margin < 2e-5:  # a filter's decision within float32's rounding may go either way
            continue
        judged += 1
        actual = probs[r].double().cpu().numpy()
        differ = (actual > 0) != (exact.probs > 0)
        assert np.all(exact.probs[differ] < 1e-37), (  # what float32 cannot hold
            f"request {r} ({list(SETTINGS)[r]}) keeps {(actual > 0).sum()} entries, expected {(exact.probs > 0).sum()}"
        )
        np.testing.assert_allclose(actual, exact.probs, rtol=2e-4, atol=1e-7, err_msg=list(SETTINGS)[r])
    assert judged >= len(SETTINGS) // 2


@grid("sample", cpu=12, cuda=24, vocab=(1, 5, 1000, 8194), scale=(1.0, 5.0))
def test_drawn_tokens_win_the_exponential_race_and_are_marked(case):
    batch = Batch(case, list(SETTINGS), case.vocab, case.scale)
    before = batch.seen.clone()
    expected = [batch.expected(r) for r in range(len(SETTINGS))]
    tokens = batch.sample()
    assert tokens.dtype == torch.int64 and tokens.shape == (len(SETTINGS),)
    judged = 0
    for r, exact in enumerate(expected):
        winner = draw(exact.probs, int(batch.seed[r]), int(batch.step[r]))
        assert exact.probs[int(tokens[r])] > 0 or exact.margin < 2e-5
        if min(winner.margin, exact.margin) > 1e-3:
            judged += 1
            assert int(tokens[r]) == winner.token, list(SETTINGS)[r]
        before[r, tokens[r]] = 1
    assert judged >= len(SETTINGS) // 2
    assert torch.equal(batch.seen != 0, before != 0)


@grid("sample_batch", cpu=3, cuda=6)
def test_a_request_alone_draws_what_it_draws_in_the_batch(case):
    batch = Batch(case, list(SETTINGS), 700)
    seen = batch.seen.clone()
    tokens, probs = batch.sample(), None
    batch.seen.copy_(seen)
    probs = batch.probs()
    for r in range(len(SETTINGS)):
        one = {name: t[r : r + 1] for name, t in batch.parameters.items()}
        row = batch.rows[r : r + 1]
        alone = OPS.sampling_probs(batch.logits, row, seen[r : r + 1].clone(), **one)
        assert torch.equal(alone[0], probs[r])
        token = OPS.sample(
            batch.logits, row, seen[r : r + 1].clone(), **one, seed=batch.seed[r : r + 1], step=batch.step[r : r + 1]
        )
        assert token.item() == tokens[r].item()


@pytest.mark.gpu
@pytest.mark.parametrize("step", [0.0, 0.5, 1000.0], ids=["distinct", "ties", "all equal"])
def test_a_request_draws_the_same_in_batches_of_any_size(step):
    # More requests leave fewer thread blocks to each, which share what top-k and top-p have to count.
    batch = Batch(Case(device="cuda", dtype=torch.float32), list(SETTINGS) * 16, 8194)
    if step > 0:
        batch.logits.copy_((batch.logits / step).round() * step)
    seen = batch.seen.clone()
    together = batch.sample()
    for n in (1, 11, 16, 17, 33, 34, 66, 67, 100):
        first = {name: t[:n] for name, t in batch.parameters.items()}
        tokens = OPS.sample(
            batch.logits, batch.rows[:n], seen[:n].clone(), **first, seed=batch.seed[:n], step=batch.step[:n]
        )
        assert torch.equal(tokens, together[:n]), f"of {n} requests"


@grid("sample_strided", cpu=3, cuda=3)
def test_parameters_may_be_strided_views(case):
    batch = Batch(case, list(SETTINGS), 300)
    expected = batch.probs()
    seen = batch.seen.clone()
    tokens = batch.sample()
    spread = {name: torch.stack([t, t + 7, t], dim=1)[:, 0] for name, t in batch.parameters.items()}
    wide = torch.zeros(seen.shape[0], seen.shape[1] + 5, dtype=torch.uint8, device=case.device)
    wide[:, 2:-3] = seen
    assert torch.equal(OPS.sampling_probs(batch.logits, batch.rows, wide[:, 2:-3], **spread), expected)
    seed, step = (torch.stack([t, t + 1], dim=1)[:, 0] for t in (batch.seed, batch.step))
    room = torch.zeros(batch.logits.shape[0], 301, dtype=case.dtype, device=case.device)
    room[:, 1:] = batch.logits
    assert torch.equal(OPS.sample(room[:, 1:], batch.rows, wide[:, 2:-3], **spread, seed=seed, step=step), tokens)
    assert torch.equal(wide[:, 2:-3] != 0, batch.seen != 0)
    assert (wide[:, :2] == 0).all() and (wide[:, -3:] == 0).all()


@grid("sample_bool", cpu=2, cuda=2, dtypes=("fp32",))
def test_seen_may_be_bool(case):
    batch = Batch(case, list(SETTINGS), 300)
    expected = batch.probs()
    batch.seen = batch.seen.bool()
    assert torch.equal(batch.probs(), expected)
    token = batch.sample()
    assert batch.seen[torch.arange(len(token), device=case.device), token].all()


@grid("greedy", cpu=3, cuda=3)
def test_greedy_takes_the_first_largest_logit(case):
    batch = Batch(case, ["greedy", "greedy"], 600)
    batch.parameters["cfg_weight"].zero_()
    batch.parameters["repetition_penalty"].fill_(1.0)
    batch.logits[:, [123, 400]] = 90.0
    assert batch.sample().tolist() == [123, 123]
    probs = batch.probs()
    assert (probs[:, 123] == 1).all() and (probs.sum(dim=1) == 1).all()


@grid("ties", cpu=3, cuda=3)
def test_equal_probabilities_are_kept_or_dropped_together(case):
    batch = Batch(case, ["top_k", "nucleus", "all"], 1000)
    batch.logits.copy_((batch.logits.float() * 2).round() / 2)  # many equal logits
    batch.seen.zero_()
    probs = batch.probs()
    for r in range(3):
        exact = batch.expected(r)
        cond, uncond = batch.rows[r].tolist()
        combined = batch.logits[cond].float()
        if uncond >= 0:
            combined = combined + batch.parameters["cfg_weight"][r] * (combined - batch.logits[uncond].float())
        for value in combined.unique():
            assert probs[r][combined == value].unique().numel() == 1
        if exact.margin > 2e-5:
            np.testing.assert_allclose(probs[r].double().cpu().numpy(), exact.probs, rtol=2e-4, atol=1e-7)


@grid("draws", cpu=2, cuda=2, dtypes=("fp32",))
def test_draws_over_many_steps_follow_the_probabilities(case):
    draws, vocab = 4000, 12
    logits = case.randn(1, vocab)
    rows = torch.tensor([[0, -1]], dtype=torch.int32, device=case.device).expand(draws, 2).contiguous()
    parameters = {
        name: torch.full(
            (1,), value, dtype=torch.int32 if name == "top_k" else torch.float32, device=case.device
        ).expand(draws)
        for name, value in zip(NAMES, (0.0, 1.0, 1.0, 0.05, 1.0, 0), strict=True)
    }
    seen = torch.zeros(draws, vocab, dtype=torch.uint8, device=case.device)
    probs = OPS.sampling_probs(logits, rows, seen, **parameters)[0].double().cpu().numpy()
    seed = torch.full((1,), 99, device=case.device).expand(draws)
    tokens = OPS.sample(logits, rows, seen, **parameters, seed=seed, step=torch.arange(draws, device=case.device))
    counts = np.bincount(tokens.cpu().numpy(), minlength=vocab)
    kept = probs > 0
    assert (counts[~kept] == 0).all()
    expected = draws * probs[kept]
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    assert chi_square < 31.3, f"chi-square {chi_square:.1f} over {kept.sum() - 1} degrees of freedom"  # p = 0.001 at 11


def pinned(t, device):
    return t.pin_memory() if device == "cuda" else t


class Moving:
    """What sample_advance moves on, of a Batch."""

    def __init__(self, batch, slots=0):
        requests, device = len(batch.settings), batch.device
        self.batch = batch
        self.seen, self.step = batch.seen.clone(), batch.step.clone()
        self.tokens = torch.full((requests,), -7, dtype=torch.int64, device=device)
        self.positions = torch.arange(requests, device=device) + 10
        self.seqlens = torch.arange(batch.logits.shape[0], dtype=torch.int32, device=device) * 3
        self.advance = torch.ones(requests, dtype=torch.int64, device=device)
        self.last_position = 10 + requests - 2  # the last two requests reach it
        self.history = pinned(torch.full((slots, requests), -9), device) if slots else None
        self.turn = torch.arange(requests, device=device) * 7 + 2 if slots else None

    def sample_advance(self):
        b = self.batch
        moving = (self.tokens, self.positions, self.seqlens, self.advance, self.last_position)
        history = (self.history, self.turn)
        OPS.sample_advance(b.logits, b.rows, self.seen, *b.parameters.values(), b.seed, self.step, *moving, *history)


@grid("sample_advance", cpu=4, cuda=12, vocab=(5, 1000, 8194, 8193, 14000))
def test_sample_advance_draws_as_sample_does_and_moves_on(case):
    batch = Batch(case, list(SETTINGS), case.vocab)
    moving = Moving(batch, slots=4)
    moving.advance[2] = 0
    tokens = batch.sample()
    moving.sample_advance()
    assert torch.equal(moving.tokens, tokens)
    assert torch.equal(moving.seen, batch.seen)
    assert torch.equal(moving.step, batch.step + moving.advance)
    requests = len(batch.settings)
    start = torch.arange(requests, device=case.device) + 10
    assert torch.equal(moving.positions, (start + moving.advance).clamp(max=moving.last_position))
    expected = torch.arange(batch.logits.shape[0], dtype=torch.int32, device=case.device) * 3
    for r, pair in enumerate(batch.rows.tolist()):
        for row in pair:
            if row >= 0:
                expected[row] += int(moving.advance[r])
    assert torch.equal(moving.seqlens, expected)
    if case.device == "cuda":
        torch.cuda.synchronize()
    for r in range(requests):
        column = [-9] * 4
        column[(7 * r + 2) % 4] = int(tokens[r])
        assert moving.history[:, r].tolist() == column
        assert moving.turn[r] == 7 * r + 3


@grid("sample_padding", cpu=2, cuda=4, vocab=(1000, 8194, 14000))
def test_sample_advance_leaves_padding_alone(case):
    batch = Batch(case, ["chatterbox", "nucleus", "greedy", "plain"], case.vocab)
    expected = batch.sample()
    batch.seen.zero_()
    batch.rows[1:3] = -1
    moving = Moving(batch, slots=1)
    moving.seen.zero_()
    before = [t.clone() for t in (moving.step, moving.positions)]
    moving.sample_advance()
    if case.device == "cuda":
        torch.cuda.synchronize()
    assert moving.tokens[1:3].tolist() == [-7, -7] and moving.history[0, 1:3].tolist() == [-9, -9]
    assert moving.turn[1:3].tolist() == [9, 16] and moving.turn[3] == 24
    assert moving.tokens[3] == expected[3]
    assert moving.seen[1:3].sum() == 0 and moving.seen[3].sum() == 1
    for now, then in zip((moving.step, moving.positions), before, strict=True):
        assert torch.equal(now[1:3], then[1:3]) and now[0] == then[0] + 1


def test_sample_advance_names_the_wrong_argument():
    batch = Batch(Case(device="cpu", dtype=torch.float32), ["plain", "plain"], 50)
    wrong = {
        "tokens": (torch.zeros(3, dtype=torch.int64), "tokens has shape [3], expected [2] (requests)"),
        "positions": (torch.zeros(2), "positions is float32, expected int64"),
        "seqlens": (torch.zeros(3, dtype=torch.int32), "cache_seqlens has shape [3], expected [2] (rows of logits)"),
        "history": (torch.zeros(4, 3, dtype=torch.int64), "history has shape [4, 3], expected [4, 2]"),
        "turn": (None, "history and turn are given together"),
        "last_position": (-1, "last_position is -1"),
        "step": (torch.zeros(1, dtype=torch.int64).expand(2), "step is written in place, but it is expanded"),
    }
    for name, (value, text) in wrong.items():
        moving = Moving(batch, slots=4)
        setattr(moving, name, value)
        with pytest.raises(RuntimeError) as error:
            moving.sample_advance()
        assert str(error.value).startswith("vivace.sample_advance: ") and text in str(error.value)


@pytest.mark.gpu
def test_history_in_memory_that_the_device_cannot_write_is_an_error():
    batch = Batch(Case(device="cuda", dtype=torch.float32), ["plain"], 50)
    moving = Moving(batch, slots=4)
    moving.history = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="history is on the CPU and not pinned"):
        moving.sample_advance()


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["chatterbox", "plain", "nucleus"])
def test_a_million_draws_on_cuda_follow_the_exact_probabilities(setting):
    draws, vocab, calls = 1 << 16, 300, 16
    batch = Batch(Case(device="cuda", dtype=torch.float32), [setting], vocab, 2.0)
    exact = batch.expected(0)
    assert exact.margin > 2e-5
    batch.rows = batch.rows.expand(draws, 2).contiguous()
    batch.parameters = {name: t.expand(draws) for name, t in batch.parameters.items()}
    batch.seed = batch.seed.expand(draws)
    seen, counts = batch.seen.expand(draws, vocab), torch.zeros(vocab, dtype=torch.int64, device="cuda")
    for call in range(calls):
        batch.seen, batch.step = seen.clone(), torch.arange(call * draws, (call + 1) * draws, device="cuda")
        counts += torch.bincount(batch.sample(), minlength=vocab)
    counts = counts.double().cpu().numpy()
    assert counts[exact.probs == 0].sum() == 0
    # Cells of at least ten expected draws; what is rarer counts together.
    expected = draws * calls * exact.probs
    common = expected >= 10
    cells = [(counts[common], expected[common])]
    if (~common).any() and expected[~common].sum() > 0:
        cells.append((counts[~common].sum(keepdims=True), expected[~common].sum(keepdims=True)))
    chi_square = sum(((n - e) ** 2 / e).sum() for n, e in cells)
    freedom = sum(len(n) for n, _ in cells) - 1
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert abs(z) < 4, f"chi-square {chi_square:.1f} over {freedom} degrees of freedom: {z:.1f} standard deviations"


@grid("sample_nan", cpu=2, cuda=3, dtypes=("fp32",))
def test_infinite_and_nan_logits_stay_in_their_request(case):
    batch = Batch(case, ["chatterbox", "plain", "chatterbox"], 400)
    clean = batch.probs()
    batch.logits[int(batch.rows[1, 0]), 17] = float("nan")
    assert torch.equal(batch.probs()[[0, 2]], clean[[0, 2]])
    batch.logits[int(batch.rows[1, 0]), 17] = -float("inf")
    probs = batch.probs()
    assert probs[1, 17] == 0 and torch.isfinite(probs).all()


@grid("sample_none", cpu=1, cuda=1, dtypes=("fp32",))
def test_no_requests_draw_nothing(case):
    nothing = {
        name: torch.zeros(0, dtype=torch.int32 if name == "top_k" else torch.float32, device=case.device)
        for name in NAMES
    }
    rows, seen = (
        torch.zeros(0, 2, dtype=torch.int32, device=case.device),
        torch.zeros(0, 9, dtype=torch.uint8, device=case.device),
    )
    logits, empty = torch.zeros(1, 9, device=case.device), torch.zeros(0, dtype=torch.int64, device=case.device)
    assert OPS.sample(logits, rows, seen, **nothing, seed=empty, step=empty).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [8194, 8193, 700, 3])
@pytest.mark.parametrize("temperature", [0.8, 1e-6, 1e25])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 4.0, 1e6, 1e30])
def test_small_vocabularies_draw_as_large_ones_do(scale, temperature, vocab):
    # They have kernels of their own, which round times differently: a seed without close races. Entries of -inf make a
    # small vocabulary large and are never drawn.
    torch.manual_seed(19)
    batch = Batch(Case(device="cuda", dtype=torch.float32), list(SETTINGS) * 7, vocab, scale)
    batch.parameters["temperature"].mul_(temperature)
    batch.parameters["repetition_penalty"][::5] = 1e-20
    if vocab > 3:
        for row, value in ((0, float("inf")), (3, float("nan")), (5, -float("inf"))):
            batch.logits[row, vocab // 3] = value
    large = torch.full((batch.logits.size(0), 9500), -float("inf"), device="cuda")
    large[:, :vocab] = batch.logits
    seen = torch.zeros(batch.seen.size(0), 9500, dtype=torch.uint8, device="cuda")
    seen[:, :vocab] = batch.seen
    expected = OPS.sample(large, batch.rows, seen, **batch.parameters, seed=batch.seed, step=batch.step)
    assert torch.equal(batch.sample(), expected)
    assert torch.equal(batch.seen, seen[:, :vocab])


def test_a_draw_of_exactly_1_does_not_win_for_what_cannot_be_drawn(device):
    seed, step, first = 11, 786, 2712
    assert sampling_uniforms(seed, step, 8194)[first] == 1.0  # the first to arrive, had it a weight
    logits = torch.full((3, 8194), -float("inf"), device=device)
    logits[:, first + 1] = 0.0  # its neighbour, whom the same thread has
    logits[1, first] = -1000.0
    logits[2, first] = -80.0  # has one
    parameters = dict(zip(NAMES, SETTINGS["plain"], strict=True))
    options = {
        name: torch.tensor([x] * 3, dtype=torch.int32 if name == "top_k" else torch.float32, device=device)
        for name, x in parameters.items()
    }
    rows = torch.tensor([[0, -1], [1, -1], [2, -1]], dtype=torch.int32, device=device)
    seen = torch.zeros(3, 8194, dtype=torch.uint8, device=device)
    draws = {"seed": torch.tensor([seed] * 3, device=device), "step": torch.tensor([step] * 3, device=device)}
    assert OPS.sample(logits, rows, seen, **options, **draws).tolist() == [first + 1, first + 1, first]


@pytest.mark.gpu
def test_cuda_draws_the_tokens_that_the_cpu_draws():
    case = Case(device="cpu", dtype=torch.float32)
    batch = Batch(case, list(SETTINGS) * 6, 8194, 4.0)
    leads = []
    for r in range(len(batch.settings)):
        exact = batch.expected(r)
        leads.append(min(exact.margin, draw(exact.probs, int(batch.seed[r]), int(batch.step[r])).margin))
    moved = {name: t.cuda() for name, t in batch.parameters.items()}
    tokens = OPS.sample(
        batch.logits.cuda(),
        batch.rows.cuda(),
        batch.seen.cuda(),
        **moved,
        seed=batch.seed.cuda(),
        step=batch.step.cuda(),
    )
    sure = torch.tensor(leads) > 1e-3
    assert sure.sum() > len(leads) // 2
    assert torch.equal(batch.sample()[sure], tokens.cpu()[sure])
