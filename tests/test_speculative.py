"""Speculative decoding: the text is the model's own, whoever drafts; the drafts are what the layer alone would say."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

import minglm
from minglm.api import Model
from minglm.fast import team
from minglm.fast.engine import PIECE, FastMtpLayer, MtpDecoder
from minglm.fast.jit import DISABLE_JIT
from minglm.generate import speculative
from minglm.generate.loop import NumpyEngine, Round, steps
from minglm.generate.sampling import Sampling
from minglm.generate.speculative import Guess, MtpDrafter, NumpyMtpLayer, accept, speculative_steps, verify
from minglm.model import KVCache, mtp_step, transformer
from minglm.model.attention import make_layout
from minglm.model.mtp import mtp_chain, mtp_embedding_weight, mtp_head_weight, mtp_layer
from tests.helpers import difference, mutated, random_state
from tests.variants import MICRO, VARIANTS, random_params

pytestmark = pytest.mark.usefixtures("no_hang")

GREEDY = Sampling()
ONE_MTP = MICRO.replace(num_nextn_predict_layers=1)
WITH_MTP = {name: variant for name, variant in VARIANTS.items() if variant.config.num_nextn_predict_layers}


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(team, "cores", lambda: 4)


def model_of(config=ONE_MTP, seed=0, dtype=np.float32, mtp_own_ends=False):
    return Model(config, random_params(config, seed, dtype, mtp_own_ends))


# -- accepting and refusing --------------------------------------------------------------------------------------
# The distribution of the first token, exactly: u and v run over grids on whose lines the decisions change.

P = [Fraction(n, 20) for n in (10, 6, 3, 1)]
Q = [Fraction(n, 20) for n in (4, 6, 2, 8)]
U = (np.arange(8) + 0.5) / 8  # p / q is a multiple of 1/8 wherever it is below 1
V = (np.arange(7) + 0.5) / 7  # what is left of p beyond q is (6, 0, 1, 0) / 7


def first_tokens(verify):
    """Probability of each first token, drafts drawn from Q and checked against P."""
    found = np.zeros(4)
    p, q = np.array(P, float), np.array(Q, float)
    for token, u, v in itertools.product(range(4), U, V):
        found[verify([token], [q], [p, p], np.array([u]), v)[0]] += float(Q[token]) / len(U) / len(V)
    return found


def test_tokens_have_the_models_distribution_whatever_the_draft():
    np.testing.assert_allclose(first_tokens(verify), np.array(P, float), atol=1e-12)


def test_the_bound_of_that_test_is_sharp():
    """Without the residual, the other way round, or with any other of the usual mistakes it is another distribution."""
    mistakes = {
        "rest = np.maximum(p[i] - q[i], 0)": ["rest = p[i]", "rest = np.abs(p[i] - q[i])", "rest = q[i]"],
        "u[i] * q[i][token] >= p[i][token]": [
            "u[i] >= p[i][token]",
            "p[i][token] < q[i][token]",
            "u[i] * p[i][token] >= q[i][token]",
        ],
    }
    for right, wrongs in mistakes.items():
        for wrong in wrongs:
            found = first_tokens(mutated(verify, right, wrong))
            assert np.abs(found - np.array(P, float)).max() > 0.01, wrong


def test_after_a_refusal_nothing_more_is_taken_and_after_the_last_draft_comes_one_more():
    p = np.eye(4)[[2, 1, 3]] * 0.9 + 0.025
    q = [np.eye(4)[2], np.eye(4)[0]]
    assert verify([2, 0], q, p, np.array([0.5, 0.5]), 0.0) == [2, 1]  # refused at the second; the rest of p there
    assert verify([2, 0], q, p, np.array([0.5, 0.01]), 0.99) == [2, 0, 3]  # both taken; from the third row
    assert len(verify([0, 1], [np.eye(4)[0]] * 2, p, np.array([0.99, 0.0]), 0.5)) == 1


def test_equal_distributions_leave_no_rest_to_draw_from():
    p = np.array([0.25, 0.25, 0.5], np.float32)
    assert verify([1], [p], [p, p], np.array([0.999999]), 0.3)[0] == 1
    q = np.nextafter(p, np.float32(1))  # above p everywhere, as rounding may leave it
    assert verify([1], [q], [p, p], np.array([np.nextafter(1.0, 0.0)]), 0.9) == [2]


def test_greedy_takes_the_longest_right_beginning():
    logits = np.eye(5)[[1, 2, 3, 4]]
    for drafts, wanted in (((1, 2, 3), [1, 2, 3, 4]), ((1, 2, 0), [1, 2, 3]), ((0, 2, 3), [1]), ((), [1])):
        rows = logits[: len(drafts) + 1]
        assert accept([Guess(d, None) for d in drafts], rows, GREEDY, np.random.default_rng(0)) == wanted


# -- a text has the model's distribution, from end to end --------------------------------------------------------


class Chain:
    """A language of four words in which each depends on the one before: an engine, and a drafter of another one."""

    name, hidden = "chain", np.zeros((1, 1))

    def __init__(self, seed):
        self.logits = random_state(seed).standard_normal((4, 4))
        self.ids: list[int] = []

    def feed(self, ids):
        return self.feed_each(ids)[-1]

    def feed_each(self, ids):
        self.ids += ids
        return self.logits[list(ids)]

    def truncate(self, length):
        del self.ids[length:]

    def picks(self):
        return np.zeros((1, 1, 1), int)

    def begin(self, prompt, hidden):
        pass

    def draft(self, ids, hidden, count, pick):
        guesses, last = [], ids[-1]
        for _ in range(count):
            guesses.append(pick(self.logits[last]))
            last = guesses[-1].id
        return guesses


def chances(logits):
    return np.exp(logits) / np.exp(logits).sum()


def texts(target, drafter, runs=6000):
    """How often each text of three words came out, after the word 0."""
    found = np.zeros((4, 4, 4))
    for seed in range(runs):
        target.ids = []
        made = speculative_steps(target, drafter, [0], 3, Sampling(1.0), frozenset(), 4, 2, seed)
        found[tuple(step.id for step in made)] += 1 / runs
    return found


def test_sampled_texts_have_the_models_distribution(monkeypatch):
    target, drafter = Chain(1), Chain(2)
    wanted = np.zeros((4, 4, 4))
    for a, b, c in np.ndindex(4, 4, 4):
        wanted[a, b, c] = np.prod([chances(target.logits[i])[j] for i, j in ((0, a), (a, b), (b, c))])
    spread = np.sqrt(wanted * (1 - wanted) / 6000)
    assert (np.abs(texts(target, drafter) - wanted) < 4.5 * spread).all()
    monkeypatch.setattr(speculative, "verify", mutated(verify, "rest = np.maximum(p[i] - q[i], 0)", "rest = p[i]"))
    assert (np.abs(texts(target, drafter) - wanted) > 4.5 * spread).any()


def test_equal_seeds_give_equal_texts():
    def once(seed):
        made = speculative_steps(Chain(1), Chain(2), [0], 30, Sampling(1.0), frozenset(), 4, 3, seed)
        return [step.id for step in made]

    assert once(5) == once(5) != once(6)


# -- greedy text is the model's own ------------------------------------------------------------------------------


class Prophet:
    """Knows the right text, and errs at random: so that every number of drafts is accepted sometime."""

    def __init__(self, text, seed, vocab_size):
        self.text, self.random, self.vocab_size = text, random_state(seed), vocab_size

    def begin(self, prompt, hidden):
        pass

    def draft(self, ids, hidden, count, pick):
        right = (self.text[len(ids) :] + [0] * count)[:count]
        lies = self.random.randint(0, self.vocab_size, count)
        return [
            Guess(int(lie if self.random.rand() < 0.4 else token), None) for token, lie in zip(right, lies, strict=True)
        ]


@pytest.mark.parametrize("name", WITH_MTP)
@pytest.mark.parametrize("engine", ["numpy", "fast"])
def test_greedy_text_is_plain_greedy_text(name, engine):
    """Drafts of the MTP layers, in float32 and whole batches of them wrong: not a token differs."""
    config, own_ends = WITH_MTP[name]
    model = model_of(config.replace(eos_token_id=()), 3, np.float64 if engine == "numpy" else np.float32, own_ends)
    for prompt in ([5], [1, 2, 3], list(range(2 * PIECE + 3))):
        new = 6 if DISABLE_JIT else 16
        plain = model.generate(prompt, new, engine=engine)
        for draft in (1, 3):
            found = model.generate(prompt, new, engine=engine, draft=draft)
            assert found.ids == plain.ids
            assert found.stop_reason == "length"
            assert sum(1 + r.accepted for r in found.stats.rounds) == new - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("draft", [1, 2, 5])
def test_not_a_bit_differs_however_many_drafts_come_true(dtype, draft):
    """The fused step: logits of checked tokens are bit for bit those of plain decoding."""
    model = model_of().astype(dtype)
    prompt = [3, 1, 4, 1, 5]
    plain = list(model.steps(prompt, 12 if DISABLE_JIT else 40, end_ids=()))
    text = prompt + [step.id for step in plain]
    engine = model._engine("fast", len(text), None, None, draft + 1)
    prophet, rest = Prophet(text, draft, 61), (GREEDY, frozenset(), 61, draft)
    found = list(speculative_steps(engine, prophet, prompt, len(plain), *rest))
    assert [step.id for step in found] == [step.id for step in plain]
    for one, other in zip(found, plain, strict=True):
        assert np.array_equal(one.logits, other.logits)
    if not DISABLE_JIT:
        assert {step.round.accepted for step in found if step.round} == set(range(draft + 1))


def test_another_model_drafts():
    model, other = model_of(seed=1), model_of(MICRO.replace(num_hidden_layers=2, num_nextn_predict_layers=0), 2)
    plain = model.generate([7, 8, 9], 12, end_ids=())
    for engine in ("fast", "numpy"):
        found = model.generate([7, 8, 9], 12, end_ids=(), draft=3, draft_model=other, engine=engine)
        assert found.ids == plain.ids
    itself = model.generate([7, 8, 9], 13, end_ids=(), draft=3, draft_model=model)
    assert itself.stats.acceptance() == [(3, 3)] * 3  # who drafts what it will say is always right
    assert itself.ids[:12] == plain.ids


def test_a_drafting_model_reads_each_accepted_token_once():
    model, fed = model_of(seed=1), []

    class Watched(NumpyEngine):
        def feed(self, ids):
            fed.append(list(ids))
            return super().feed(ids)

    drafter = speculative.ModelDrafter(Watched(model, 40))
    target, prompt = NumpyEngine(model, 40), [7, 8, 9]
    made = [s.id for s in speculative_steps(target, drafter, prompt, 13, GREEDY, frozenset(), 61, 3)]
    assert fed[:2] == [prompt[:-1], [prompt[-1], made[0]]]
    read = [token for ids in fed[2:] for token in ids]
    assert read == made[1 : 1 + len(read)]
    assert len(read) >= 9


# -- where it ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [1, 2, 4])
def test_an_end_token_within_the_drafts_ends_the_text(draft):
    model = model_of(seed=1)
    plain = model.generate([7, 8, 9], 12, end_ids=())
    for end in plain.ids:
        wanted = model.generate([7, 8, 9], 12, end_ids=[end])
        found = model.generate([7, 8, 9], 12, end_ids=[end], draft=draft, draft_model=model)
        assert (found.ids, found.stop_reason) == (wanted.ids, "end token")


@pytest.mark.parametrize("new", range(1, 8))
def test_the_limit_holds_and_the_context_may_be_full(new):
    config = ONE_MTP.replace(max_position_embeddings=3 + new, eos_token_id=())
    model = model_of(config, 1)
    plain = model.generate([7, 8, 9], new)
    for options in ({}, {"draft_model": model}):
        found = model.generate([7, 8, 9], new, draft=5, **options)
        assert (found.ids, found.stop_reason) == (plain.ids, "length")


def test_ids_beyond_the_tokenizer_are_never_drafted():
    class Short(Model):
        usable_tokens = 7

    model = Short(ONE_MTP, random_params(ONE_MTP, 1))
    for temperature in (0.0, 2.0):
        found = model.generate([1, 2], 20, end_ids=(), draft=2, temperature=temperature)
        assert max(found.ids) < 7


# -- what the MTP layer drafts -----------------------------------------------------------------------------------


def logits_without_cache(model, ids, depth):
    """What the drafter must base guess `depth` on, from whole sequences: `ids` are the text and the guesses so far."""
    params, config, M = model.params, model.config, len(model.params.mtp)
    text = len(ids) - (depth - 1)  # tokens that are no guesses
    hidden, _ = transformer(np.array([ids[: text - 1]]), params, config)
    if depth <= M:
        longer = np.array([ids])
        padded = np.concatenate([hidden, np.zeros((1, depth, config.hidden_size), hidden.dtype)], axis=1)
        layout = make_layout(longer.shape, config, hidden.dtype, None)
        chain = mtp_chain(padded, longer, layout, params, config, depth)
        normed = chain[-1].normed
    else:
        assert M == 1  # row after row of the one layer, fed its own output
        states, next_ids = hidden, np.array([ids[1:]])
        for row in range(text - 1, len(ids)):
            layout = make_layout((1, row), config, hidden.dtype, None)
            weights, table = params.mtp[0], mtp_embedding_weight(params, params.mtp[0])
            normed, _ = mtp_layer(states, next_ids[:, :row], weights, table, config, layout)
            states = np.concatenate([states, normed[:, -1:]], axis=1)
    weight = mtp_head_weight(params, params.mtp[(depth - 1) % M])
    return normed[0, -1] @ weight.T


@pytest.mark.parametrize("layers", [1, 2])
def test_each_guess_is_what_the_layer_says_without_a_cache(layers):
    """Through a text with every number of accepted drafts: warm-up, cutting back and recycling leave nothing wrong."""
    config = MICRO.replace(num_nextn_predict_layers=layers, eos_token_id=())
    model = model_of(config, 4, np.float64)
    text = [3, 1, 4, *model.generate([3, 1, 4], 30, engine="numpy").ids]
    mtp, compared = MtpDrafter([NumpyMtpLayer(model, 40, n) for n in range(layers)]), []
    prophet = Prophet(text, 5, 61)

    class Both:
        """The prophet's guesses count, the MTP layer's are compared."""

        def begin(self, prompt, hidden):
            mtp.begin(prompt, hidden)

        def draft(self, ids, hidden, count, pick):
            told, seen = prophet.draft(ids, hidden, count, pick), []

            def follow(logits):
                seen.append(logits)
                return told[len(seen) - 1]

            mtp.draft(ids, hidden, count, follow)
            for k, logits in enumerate(seen, start=1):
                if layers == 1 or k <= layers:
                    before = [*ids, *(guess.id for guess in told[: k - 1])]
                    assert difference(logits, logits_without_cache(model, before, k)) < 1e-12, k
                    compared.append(k)
            return told

    engine = NumpyEngine(model, 40)
    made = [s.id for s in speculative_steps(engine, Both(), text[:3], 30, GREEDY, frozenset(), 61, 3)]
    assert made == text[3:]
    assert {1, 2, 3}.issuperset(compared)
    assert compared.count(2) > 5


@pytest.mark.parametrize("name", WITH_MTP)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_fused_layer_is_the_books(name, threads):
    config, own_ends = WITH_MTP[name]
    model, random = model_of(config, 2, mtp_own_ends=own_ends), random_state(9)
    for number in range(len(model.params.mtp)):
        decoder = MtpDecoder(model.params, config, number, 4, threads)
        caches = [KVCache(config, capacity=16, layers=1) for _ in range(2)]
        for T in (1, 4, 2):
            hidden = random.standard_normal((T, config.hidden_size)).astype(np.float32)
            ids = random.randint(0, config.vocab_size, T)
            logits, normed = decoder.step(hidden, ids, caches[0])
            wanted, wanted_normed = mtp_step(hidden[None], ids[None], model.params, config, caches[1], number)
            assert difference(logits, wanted[0, -1]) < 1e-5
            assert difference(normed, wanted_normed[0]) < 1e-5
        assert difference(caches[0].k, caches[1].k) < 1e-5


def test_a_long_prompt_warms_the_layer_up_as_a_short_one_does():
    model = model_of(seed=5)
    random = random_state(3)
    hidden = random.standard_normal((40, 20)).astype(np.float32)
    ids = random.randint(0, 61, 40)
    whole, pieces = (FastMtpLayer(model.params, model.config, 64) for _ in range(2))
    logits, normed = whole.feed(hidden, ids)
    assert normed.shape == (40, 20)
    for start in range(0, 40, 5):
        wanted, _ = pieces.feed(hidden[start : start + 5], ids[start : start + 5])
    assert whole.length == pieces.length == 40
    assert difference(logits, wanted) < 1e-5


def test_a_tap_sees_the_layer_draft():
    names = []
    model = model_of(seed=1)
    model.generate([1, 2, 3], 4, engine="numpy", draft=1, end_ids=(), tap=lambda name, array: names.append(name))
    assert "layers.3.eh_proj" in names
    assert names.count("layers.3.shared_head.norm") >= 2


# -- what is told ------------------------------------------------------------------------------------------------


def test_stats_add_up():
    model = model_of(seed=1)
    found = model.generate([7, 8, 9], 12, end_ids=(), draft=2)
    rounds = found.stats.rounds
    for r in rounds:
        assert 0 <= r.accepted <= r.drafted <= 2
        assert r.draft_seconds >= 0 < r.verify_seconds
    assert found.stats.decode_seconds == pytest.approx(sum(r.draft_seconds + r.verify_seconds for r in rounds))
    made = found.stats.acceptance()
    assert made[0][1] == sum(r.drafted >= 1 for r in rounds)
    assert sum(accepted for accepted, _ in made) == sum(r.accepted for r in rounds)
    assert "drafts accepted by depth" in str(found.stats)


@pytest.mark.parametrize("engine", ["numpy", "fast"])
def test_experts_are_counted_once_each(engine):
    model = model_of(seed=1)
    made = model._engine(engine, 16, None, None, 4)
    made.feed([1, 2, 3])
    made.feed_each([4, 5, 6, 7])
    routing = model.trace([1, 2, 3, 4, 5, 6, 7]).routing
    wanted = np.full((4, 3, 3), -1)
    wanted[:, 1:] = routing.indices[3:]
    assert np.array_equal(np.sort(made.picks()), np.sort(wanted))
    this = Round(3, 0, 0.0, 0.0, wanted)
    assert this.experts == sum(len(np.unique(routing.indices[3:, i])) for i in range(2)) < wanted[:, 1:].size


def test_what_cannot_draft_says_so():
    model, bare = model_of(), model_of(MICRO.replace(num_nextn_predict_layers=0))
    nano, larger = minglm.load("glm-nano"), minglm.new(MICRO.replace(vocab_size=64))
    for wrong, message in (
        (lambda: bare.generate([1], 3, draft=1), "no multi-token-prediction layer to draft with; give draft_model="),
        (lambda: model.generate([1], 3, draft=-1), "draft = -1 must be a whole number between 0"),
        (lambda: model.generate([1], 3, draft=99), "between 0 .no drafts. and 32"),
        (lambda: model.generate([1], 3, draft=1.5), "draft = 1.5 must be"),
        (lambda: model.generate([1], 3, draft_model=bare), "draft is 0; say how many"),
        (lambda: model.generate([1], 3, draft=2, draft_model=larger), "another tokenizer"),
        (lambda: nano.generate([1], 3, draft=2, draft_model=model), "another tokenizer"),
        (lambda: model.generate([1], 3, draft=2, draft_model="glm-dream"), "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_broken_draft_is_named():
    model = model_of(seed=1)
    broken = model.params.mtp[0]._replace(enorm=model.params.mtp[0].enorm._replace(weight=np.full(20, np.nan, "f4")))
    with pytest.raises(ValueError, match="a draft cannot be chosen: the logits are NaN"):
        Model(model.config, model.params._replace(mtp=(broken,))).generate([1, 2], 4, draft=1, end_ids=())


def test_plain_and_speculative_loops_share_their_first_token():
    model = model_of(seed=1)
    rest = (Sampling(0.8), frozenset(), 61)
    plain = next(steps(NumpyEngine(model, 8), [1, 2], 5, *rest, 7))
    first = next(speculative_steps(NumpyEngine(model, 8), Prophet([], 0, 61), [1, 2], 5, *rest, 2, 7))
    assert first.id == plain.id


@pytest.mark.parametrize("engine", ["fast", "numpy"])
def test_models_with_other_numbers_of_unused_rows_draft_for_each_other(engine):
    """One tokenizer, but a vocab_size rounded up to another multiple."""
    model = minglm.load("glm-nano")
    longer = minglm.new(model.config.replace(vocab_size=model.config.vocab_size + 52), seed=1)
    longer.tokenizer = model.tokenizer
    for one, other in ((model, longer), (longer, model)):
        made = one.generate("def f", 12, temperature=1, seed=3, end_ids=(), draft=3, draft_model=other, engine=engine)
        assert len(made.ids) == 12
