"""The trace page in Chromium: it opens from a file, asks for nothing, says what is true, and does what its keys say."""

import csv
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest

import minglm
from minglm.look.page import write_page
from minglm.model.params import map_arrays

SHIPPED = ("glm-nano", "glm-tiny", "glm-tiny-balanced", "glm-tiny-unbalanced")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "nano.html"
    assert write_page(minglm.load("glm-nano"), "2 + 2 =", path) == []
    return path


# -- opening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_checkpoint_opens_without_a_word(tmp_path, open_page, name):
    path = tmp_path / "page.html"
    write_page(minglm.load(name), "def add(a, b):\n    return", path)
    assert path.stat().st_size <= 15e6
    page = open_page(path, bypass_csp=False)
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []
    assert page.text("#step-name") == "embed_tokens"


def test_a_long_prompt_opens_and_says_what_was_left_out(tmp_path, open_page):
    path = tmp_path / "page.html"
    model = minglm.load("glm-tiny")
    ids = np.arange(512) * 37 % 2000
    notes = write_page(model, ids, path)
    assert path.stat().st_size <= 15e6
    page = open_page(path, "#layer=3&step=probs&token=511")
    assert page.said == []
    assert "512 tokens; arrays are kept for" in notes[0]
    assert all(note in page.text("#notes") for note in notes)
    page.page.click("#tokens [data-token='200']")  # in the middle: routing is there, this picture has no row of it
    page.drawn()
    assert "Experts of token 200" in page.text("#lanes")
    assert page.page.locator(".cell.picked").count() == 2 * 5
    page.press("Shift+ArrowRight")
    assert page.said == []
    missing = page.page.evaluate(
        """async () => {
            const missing = [];
            for (const step of DATA.traces[0].steps.filter((step) => step.rows.includes(200)))
                missing.push(await opened(0, step, 200, 0, 0));
            return missing.filter((found) => typeof found === "string");
        }"""
    )
    assert missing
    assert all("minglm step opens it" in said for said in missing)


def test_the_longest_prompt_beside_another_stays_small(tmp_path, open_page):
    """Keys and values of the middle go too; what needs them says so."""
    path = tmp_path / "page.html"
    model = minglm.load("glm-tiny")
    ids = np.arange(model.config.max_position_embeddings) * 37 % 2000
    notes = write_page(model, ids, path, without_bias=True)
    assert path.stat().st_size <= 15e6
    assert all("Routing is kept for all" in note for note in notes[:2])
    page = open_page(path, f"#layer=3&step=heads&token={len(ids) - 1}&cell=1")
    assert "the value of token 4 is not in this page" in page.text("#opened")
    page.page.click("#tokens [data-token='2']")
    page.drawn()
    assert "together" in page.text("#opened")
    page.page.click("#tokens [data-token='500']")
    page.drawn()
    assert page.page.locator(".cell.picked").count() == 2 * 5
    assert page.said == []


def test_the_page_can_load_and_run_nothing_else(nano, open_page):
    page = open_page(nano, bypass_csp=False)
    said = page.page.evaluate(
        """async () => {
            const tries = [() => fetch("https://example.org/"), () => import("data:text/javascript,1")];
            const refused = async (t) => t().then(() => "done", () => "refused");
            return Promise.all(tries.map(refused));
        }"""
    )
    assert said == ["refused"] * 2


# -- truth -------------------------------------------------------------------------------------------------------

CONFIGS = {
    "nano": None,
    "groups, no norms": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "use_qk_norm": False},
    "tied, alone": {"tie_word_embeddings": True, "n_shared_experts": 0, "routed_scaling_factor": 2.5},
    "dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "all experts, G = H": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "num_key_value_heads": 6},
    "one head, all of it turned": {"num_attention_heads": 1, "num_key_value_heads": 1, "partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize("which", CONFIGS)
def test_every_number_opened_is_the_number(tmp_path, open_page, nano, which):
    path = nano
    if CONFIGS[which] is not None:
        path = tmp_path / "page.html"
        rng = np.random.default_rng(1)
        model = minglm.new(minglm.PRESETS["micro"].replace(**CONFIGS[which]), seed=1)

        def loud(name, array):  # biases that are not 0; in bfloat16, as the page keeps weights
            moved = array + 0.3 * rng.standard_normal(array.shape) if array.ndim == 1 else array
            return (moved.astype("f4").view("u4") & 0xFFFF0000).view("f4")

        cut = map_arrays(loud, model.params)
        write_page(minglm.Model(model.config, cut), [3, 14, 15, 9, 2], path)
    page = open_page(path)
    found = page.page.evaluate(
        """async () => {
            const found = [];
            for (const step of DATA.traces[0].steps) {
                for (const token of step.rows.slice(-2)) {
                    const map = await (state.token = token, state.cell = null, mapOf(0, step));
                    for (const cell of [0, Math.floor(map.columns / 2), map.columns - 1]) {
                        const open = await opened(0, step, token, cell, state.head);
                        const value = map.value(step.rows.indexOf(token), cell);
                        found.push([step.name, token, cell, String(value), String(open.total ?? open)]);
                    }
                }
            }
            return found;
        }"""
    )
    assert len(found) > 300
    for name, token, cell, value, total in found:
        assert float(total) == pytest.approx(float(value), rel=2e-4, abs=2e-5), (name, token, cell, value, total)


def test_numbers_are_those_of_the_model(nano, open_page):
    trace = minglm.load("glm-nano").trace("2 + 2 =")
    page = open_page(nano, "#layer=1&step=expert_weights&token=2&cell=1")
    assert page.text("#opened h3") == f"token 2 “␣”, K 1: {trace['layers.1.mlp.expert_weights'][2, 1]:.5g}"
    assert page.text("#code").startswith("minglm/model/router.py:")
    top = int(np.argmax(trace["logits"][0, 2]))
    assert page.text("#guesses tbody tr td") == minglm.load("glm-nano").tokenizer.token(top)


# -- going around ------------------------------------------------------------------------------------------------


def test_keys(nano, open_page):
    page = open_page(nano)
    page.press("ArrowRight")
    assert page.text("#step-name") == "layers.0.input_layernorm"
    page.press("]")
    assert page.text("#step-name") == "layers.1.input_layernorm"
    page.press("[")
    page.press("ArrowLeft")
    assert page.text("#step-name") == "embed_tokens"
    page.press("ArrowUp")
    assert page.page.get_attribute("#tokens [aria-current]", "data-token") == "3"
    page.press("ArrowDown")
    page.press("Shift+ArrowRight")
    assert "D 0:" in page.text("#opened h3")
    page.press("Shift+ArrowRight")
    page.press("Shift+ArrowUp")
    assert page.text("#opened h3").startswith("token 3 “2”, D 1:")
    page.page.keyboard.press("?")
    assert page.page.is_visible("#keys")
    page.page.keyboard.press("Escape")
    assert not page.page.is_visible("#keys")
    assert page.said == []


def test_clicks(nano, open_page):
    page = open_page(nano)
    page.page.click("summary:has-text('layer 2')")
    page.page.click("[data-step='layers.2.self_attn.probs']")
    page.drawn()
    assert page.text("#step-name") == "layers.2.self_attn.probs"
    page.page.click("[data-head='3']")
    page.drawn()
    assert page.page.get_attribute("[data-head='3']", "aria-pressed") == "true"
    page.page.click("#tokens [data-token='3']")
    page.drawn()
    page.page.click("#view canvas", position={"x": 100, "y": 70})  # row 3, key 0
    page.drawn()
    assert page.text("#opened h3").startswith("token 3 “2”, key 0 “2”:")
    page.page.click("#on")
    page.drawn()
    assert page.text("#step-name") == "layers.2.self_attn.heads"
    page.page.click(".lane button >> nth=0")
    page.drawn()
    assert page.text("#step-name") == "layers.1.mlp.expert_weights"


def test_links_lead_to_a_place_and_follow(nano, open_page):
    page = open_page(nano, "#layer=3&step=router&token=1")
    assert page.text("#step-name") == "layers.3.mlp.router_logits"
    assert page.page.get_attribute("#tokens [aria-current]", "data-token") == "1"
    page.press("ArrowRight")
    assert page.page.url.endswith("#layer=3&step=mlp.router_scores&token=1")
    page.page.evaluate("() => { location.hash = '#step=logits&token=4&cell=7'; }")
    page.page.wait_for_selector("#step-name:text('logits')")
    page.drawn()
    assert "V 7:" in page.text("#opened h3")
    page.page.evaluate("() => { location.hash = '#panel'; }")  # where "Skip to the step" leads: no other place
    page.page.wait_for_timeout(100)
    assert page.text("#step-name") == "logits"
    for nonsense in (
        "#layer=1&step=probs&head=99&cell=999",
        "#layer=1&step=probs&head=x&cell=-3&token=1.5",
        "#step=logits&cell=x",
        "#layer=&token=NaN",
    ):
        assert open_page(nano, nonsense).said == []
    assert "head=3&cell=4" in open_page(nano, "#layer=1&step=probs&head=99&cell=999").page.url
    again = open_page(
        nano, "#layer=99&step=nothing&token=-3&cell=x&head=9&trace=b"
    )  # nonsense: the nearest that there is
    assert again.said == []
    assert again.text("#step-name") == "embed_tokens"


@pytest.mark.parametrize("compare", [False, True])
def test_the_address_of_every_step_leads_back_to_it(tmp_path, open_page, nano, compare):
    path = tmp_path / "page.html" if compare else nano
    if compare:
        write_page(minglm.load("glm-nano"), "2 + 2 =", path, without_bias=True)
    lost = open_page(path).page.evaluate(
        """() => {
            const lost = [];
            for (const [trace, mode] of DATA.traces.map((_, i) => [i, i ? "b" : "a"]))
                for (let step = 0; step < DATA.traces[trace].steps.length; step++) {
                    go({ mode, trace, step, token: 1, cell: null });
                    const there = place();
                    goToPlace(there);
                    if (state.step !== step || state.trace !== trace) lost.push(there);
                }
            return lost;
        }"""
    )
    assert lost == []


def test_keys_of_other_keyboards(nano, open_page):
    page = open_page(nano, "#layer=1&step=middle&token=0")
    pressed = ("]", "altKey: true, ctrlKey: true", 2), ("[", "altKey: true", 1), ("]", "ctrlKey: true", 1)
    for key, modifiers, leads in pressed:
        event = f"new KeyboardEvent('keydown', {{ key: '{key}', bubbles: true, {modifiers} }})"
        page.page.evaluate(f"() => document.body.dispatchEvent({event})")
        page.drawn()
        assert page.text("#step-name") == f"layers.{leads}.middle"


def test_the_keyboard_stays_where_it_was(nano, open_page):
    page = open_page(nano, "#layer=1&step=probs&token=1")
    for target in ("[data-token='3']", "[data-head='2']", "[data-step='layers.1.self_attn.o']", "[data-layer='2']"):
        page.page.focus(target)
        page.press("Enter")
        assert page.page.evaluate(f'() => document.activeElement.matches("{target}")'), target


def test_the_picture_does_not_jump(nano, open_page):
    page = open_page(nano, "#step=logits&token=2&cell=1900")
    scrolled = "() => document.querySelector('.scroll').scrollLeft"
    assert page.page.evaluate(scrolled) > 1000  # the number is to be seen
    page.page.evaluate("() => { document.querySelector('.scroll').scrollLeft -= 7; }")
    before = page.page.evaluate(scrolled)
    box = page.page.locator(".scroll").bounding_box()
    page.page.mouse.click(box["x"] + 300, box["y"] + 70)
    page.drawn()
    assert page.text("#opened h3").startswith("token 3 “2”, V ")
    assert page.page.evaluate(scrolled) == before


def test_the_address_may_lag(nano, open_page):
    page = open_page(nano)
    page.page.evaluate(
        "() => { history.replaceState = () => { throw new DOMException('too often', 'SecurityError'); }; }"
    )
    page.press("ArrowRight")
    assert page.text("#step-name") == "layers.0.input_layernorm"
    assert page.said == []


# -- what if -----------------------------------------------------------------------------------------------------


def rows_of(page):
    return [row.split("\t") for row in page.text("#routed-again tbody").splitlines()]


def slide(page, name, value):
    page.page.eval_on_selector(
        f"#slider-{name}", f"(e) => {{ e.value = {value}; e.dispatchEvent(new Event('input')); }}"
    )
    page.page.wait_for_selector(f"#slider-{name} + output:text('{value}')")


def test_sliders_route_one_token_again(nano, open_page):
    model = minglm.load("glm-nano")
    page = open_page(nano, "#layer=2&step=router&token=3")
    assert "This layer only" in page.text("#sliders")
    scores = model.trace("2 + 2 =")["layers.2.mlp.router_scores"][3].astype(np.float64)
    bias = model.params.layers[2].mlp.gate.e_score_correction_bias.astype(np.float64)
    for K, factor, scale in ((2, 1, 1.5), (4, 1, 1.5), (4, 0, 3), (1, 2.5, 3)):
        for name, value in (("K", K), ("factor", factor), ("scale", scale)):
            slide(page, name, value)
        page.page.wait_for_function(
            "(n) => document.querySelectorAll('#routed-again tbody tr').length === n", arg=min(K + 3, 8)
        )
        picks = np.argsort(-(scores + factor * bias), kind="stable")[:K]
        weights = scores[picks] / scores[picks].sum() * scale
        rows = rows_of(page)
        assert [int(row[0].split()[0]) for row in rows[:K]] == picks.tolist()
        assert [float(row[3]) for row in rows[:K]] == pytest.approx(weights.tolist(), rel=1e-4)
        assert all(row[3] == "–" for row in rows[K:])
    page.page.click("text=as it was")
    page.drawn()
    assert len(rows_of(page)) == 5


def test_sliders_end_at_what_the_router_can_do(tmp_path, open_page):
    config = minglm.PRESETS["micro"].replace(n_group=4, topk_group=2, routed_scaling_factor=12.0)
    model = minglm.new(config, seed=1)
    write_page(model, [1, 2, 3], tmp_path / "page.html")
    page = open_page(tmp_path / "page.html", "#layer=1&step=router&token=1")
    assert page.page.get_attribute("#slider-K", "max") == "4"  # of two open groups of two experts
    assert page.page.input_value("#slider-scale") == "12"
    slide(page, "K", 4)
    slide(page, "factor", 3)
    slide(page, "scale", 0)
    assert [float(row[3]) for row in rows_of(page)[:4]] == [0.0] * 4
    assert page.said == []


# -- two traces --------------------------------------------------------------------------------------------------


def test_without_the_bias(tmp_path, open_page):
    path = tmp_path / "page.html"
    model = minglm.load("glm-tiny")
    write_page(model, "def add(a, b):", path, without_bias=True)
    page = open_page(path, "#layer=5&step=mlp.out&token=4")
    page.page.click("[data-mode='diff']")
    page.drawn()
    assert "differ by up to" in page.text("#facts")
    marked = page.page.evaluate("() => DATA.traces[0].steps.map((s) => [s.name, DATA.differs[s.name]])")
    first = next(name for name, apart in marked if apart)
    assert first == "layers.1.mlp.biased_scores"
    page.page.click("[data-mode='both']")
    page.drawn()
    assert page.page.locator("#view canvas").count() == 2
    page.page.click("[data-mode='b']")
    page.drawn()
    assert page.text("#step-name") == "layers.5.mlp.out"
    assert page.said == []
    there = open_page(path, "#layer=1&step=mlp.expert_weights&token=4&trace=nonsense")
    assert there.page.get_attribute("[data-mode='a']", "aria-pressed") == "true"


def test_both_traces_token_by_token(tmp_path, open_page):
    """Experts that other tokens picked: rows are compared by token, what differs is marked, a click opens what was
    clicked, and a step that is not there leads to the one before."""
    path = tmp_path / "page.html"
    plain = minglm.new(minglm.PRESETS["micro"], seed=1)
    bias = 0.05 * np.random.default_rng(0).standard_normal(8)

    def biased(name, array):
        return (array + bias).astype("f4") if name.endswith("e_score_correction_bias") else array

    model = minglm.Model(plain.config, map_arrays(biased, plain.params))
    ids = list(range(3, 13))
    write_page(model, ids, path, without_bias=True)
    a, b = model.trace(ids), plain.trace(ids)
    page = open_page(path)
    differs = page.page.evaluate("() => DATA.differs")
    for name in {**a, **b}:
        if name not in a or name not in b:
            assert "only in" in differs[name]
        elif a[name].shape == b[name].shape and np.array_equal(a[name], b[name]):
            tokens = ".".join([*name.split(".")[:-1], "tokens"])
            assert not differs[name] or not np.array_equal(a[tokens], b[tokens])
        else:
            assert differs[name]
    outs = [n for n in a if n.endswith(".out") and ".experts." in n]
    name = next(n for n in outs if n in b and 0 < len(common(a, b, n)) < min(len(a[n]), len(b[n])))
    page.page.evaluate(f"() => go({{ step: stepNumber('{name}') }})".replace("stepNumber", STEP))
    page.page.click("[data-mode='diff']")
    page.drawn()
    shown = page.page.evaluate("() => drawnMap.map.tokens.map((t, r) => [t, drawnMap.map.value(r, 2)])")
    assert [t for t, _ in shown] == common(a, b, name)
    for token, value in shown:
        rows = [list(each[name.replace(".out", ".tokens")]).index(token) for each in (a, b)]
        assert value == pytest.approx(float(b[name][rows[1], 2]) - float(a[name][rows[0], 2]), abs=1e-6)
    page.page.click("[data-mode='both']")
    page.drawn()
    page.page.click("#view canvas >> nth=1", position={"x": 110, "y": 5})  # B's first row, first number
    page.drawn()
    assert page.text("#opened h3").startswith(f"B: token {b[name.replace('.out', '.tokens')][0]} ")
    assert page.page.evaluate("() => state.trace") == 1
    alone = next(n for n in b if n not in a and n.endswith(".up"))
    page.page.click("[data-mode='b']")
    page.drawn()
    page.page.evaluate(f"() => go({{ step: stepNumber('{alone}') }})".replace("stepNumber", STEP))
    page.drawn()
    assert "only in B" in page.text("#facts")
    page.page.click("[data-mode='diff']")
    page.drawn()
    assert page.text("#step-name").startswith(f"layers.{alone.split('.')[1]}.mlp.")
    assert page.said == []


STEP = "((name) => DATA.traces[state.trace].steps.findIndex((step) => step.name === name))"


def common(a, b, name):
    tokens = name.replace(".out", ".tokens")
    return [t for t in a[tokens].tolist() if t in b[tokens]]


def test_thinking_or_not(tmp_path, open_page):
    path = tmp_path / "page.html"
    model = minglm.load("glm-tiny")
    ask = [{"role": "user", "content": "17+25"}]
    prompts = [model.chat_template.render(ask, enable_thinking=on) for on in (True, False)]
    write_page(model, prompts[0], path, beside=prompts[1])
    page = open_page(path, "#layer=2&step=router&token=2")
    assert page.page.locator("#compare button").count() == 3  # other tokens: no difference of arrays
    page.page.click("[data-mode='b']")
    page.drawn()
    assert page.page.locator("#tokens li").count() == model.as_ids(prompts[1]).shape[1]
    assert page.said == []


# -- saving ------------------------------------------------------------------------------------------------------


def test_panels_are_saved(nano, open_page):
    trace = minglm.load("glm-nano").trace("2 + 2 =")
    page = open_page(nano, "#layer=1&step=router_scores&token=2")
    with page.page.expect_download() as download:
        page.page.click("#csv")
    rows = list(csv.reader(io.StringIO(download.value.path().read_text("utf-8"))))
    assert rows[0] == ["token", *(f"E {e}" for e in range(8))]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], np.float32), trace["layers.1.mlp.router_scores"])
    with page.page.expect_download() as download:
        page.page.click("#svg")
    assert download.value.suggested_filename == "layers.1.mlp.router_scores.svg"
    drawn = ElementTree.fromstring(download.value.path().read_text("utf-8"))
    labels = [text.text for text in drawn.findall("{http://www.w3.org/2000/svg}text")]
    assert labels == ["0 2", "1 ␣+", "2 ␣", "3 2", "4 ␣="]
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == 5 * 8


def test_what_is_saved_says_what_it_is(tmp_path, open_page):
    """Tokens with quotes and commas; the head; which trace; labels that stay beside the picture."""
    path = tmp_path / "page.html"
    model = minglm.load("glm-tiny")
    text = '"a, b"\'; "antidisestablishmentarianism",\n'
    write_page(model, text, path, without_bias=True)
    page = open_page(path, "#layer=1&step=probs&token=2&head=1&trace=diff")
    trace = model.trace(text)
    with page.page.expect_download() as download:
        page.page.click("#csv")
    assert download.value.suggested_filename == "layers.1.self_attn.probs.head-1.B-A.csv"
    rows = list(csv.reader(io.StringIO(download.value.path().read_text("utf-8"))))
    assert [row[0] for row in rows[1:]] == [f"{t} {token}" for t, token in enumerate(trace.tokens)]
    assert {len(row) for row in rows} == {len(trace.tokens) + 1}
    with page.page.expect_download() as download:
        page.page.click("#svg")
    drawn = ElementTree.fromstring(download.value.path().read_text("utf-8"))
    assert all(len(label.text) <= 13 for label in drawn.findall("{http://www.w3.org/2000/svg}text"))


# -- for everybody -----------------------------------------------------------------------------------------------

LOOKS = {
    "light": {}, "dark": {"color_scheme": "dark"}, "phone": {"width": 390, "height": 844},
    "still": {"reduced_motion": "reduce"},
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    "place", ["#step=embed_tokens", "#layer=1&step=probs&token=2&cell=1", "#layer=2&step=router&cell=3"]
)
def test_axe_finds_nothing(nano, open_page, look, place):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(nano, place, **LOOKS[look])
    found = axe.run(page.page).response["violations"]
    serious = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []


def test_a_phone_needs_no_sideways_scrolling(nano, open_page):
    for place in ("", "#layer=1&step=q&token=2", "#step=logits"):
        page = open_page(nano, place, width=390, height=844)
        assert page.page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_a_small_phone_with_dark_and_large(nano, open_page):
    page = open_page(nano, "#layer=1&step=routed&token=2&cell=1", width=320, height=700, color_scheme="dark")
    page.page.click("#large")
    page.drawn()
    assert page.page.evaluate("() => document.documentElement.scrollWidth") <= 320


@pytest.mark.parametrize(("token", "cell"), [(0, 0), (4, 7)])
def test_the_frame_of_a_number_is_whole(nano, open_page, token, cell):
    page = open_page(nano, f"#layer=1&step=router_scores&token={token}&cell={cell}")
    edges = page.page.evaluate(
        """([row, column]) => {
            const [, , left, cell, tall] = drawnMap.drawn.size;
            const pen = drawnMap.drawn.canvas.getContext("2d");
            const at = (x, y) => {
                const [red, , , opaque] = pen.getImageData(Math.round(x), Math.round(y), 1, 1).data;
                return opaque ? red : 255;
            };
            const [x, y] = [left + column * cell, row * tall];
            const sides = [at(x - 2, y + tall / 2), at(x + cell + 1, y + tall / 2)];
            return [...sides, at(x + cell / 2, Math.max(y - 2, 0)), at(x + cell / 2, y + tall + 1)];
        }""",
        [token, cell],
    )
    assert max(edges) < 80  # ink all round


def test_dark_and_large(nano, open_page):
    page = open_page(nano)
    small = page.page.evaluate("() => getComputedStyle(document.body).fontSize")
    page.page.click("#large")
    page.page.click("#dark")
    page.drawn()
    assert page.page.evaluate("() => getComputedStyle(document.body).fontSize") > small
    assert page.page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 29)"
    assert page.page.get_attribute("#dark", "aria-pressed") == "true"


def test_everything_is_reached_by_tab(nano, open_page):
    page = open_page(nano)
    reached = set()
    for _ in range(60):
        page.page.keyboard.press("Tab")
        reached.add(page.page.evaluate("() => document.activeElement.id || document.activeElement.tagName"))
    assert {"back", "on", "large", "dark", "help", "code", "CANVAS", "svg", "csv", "slider-K"} <= reached


# -- trouble -----------------------------------------------------------------------------------------------------


def test_texts_cannot_break_out(tmp_path, open_page):
    path = tmp_path / "page.html"
    write_page(minglm.load("glm-nano"), "</script><b>\"'&\u2028\x00<!--", path)
    page = open_page(path)
    assert page.said == []
    assert page.page.locator("b").count() == 0
    assert "</script>" in page.text("#notes")


@pytest.mark.parametrize("mark", ["@SCRIPT@", "@GROUPS@ @DATA@", "@STYLE@@TITLE@"])
def test_a_prompt_may_be_a_mark_of_the_page(tmp_path, open_page, mark):
    path = tmp_path / "page.html"
    write_page(minglm.load("glm-nano"), mark, path)
    page = open_page(path)
    assert page.said == []
    assert f'"{mark}"' in page.text("#notes")


@pytest.mark.parametrize("ids", [[5], [7, 7]])
def test_short_prompts_without_a_tokenizer(tmp_path, open_page, ids):
    path = tmp_path / "page.html"
    write_page(minglm.new("micro"), ids, path)
    page = open_page(path)
    for _ in range(12):
        page.press("ArrowRight")
    assert page.said == []


def test_numbers_that_are_none(tmp_path, open_page):
    model = minglm.new("micro")
    broken = map_arrays(lambda n, a: np.full_like(a, np.nan) if n == "model.norm.weight" else a, model.params)
    path = tmp_path / "page.html"
    write_page(minglm.Model(model.config, broken), [1, 2, 3], path)
    page = open_page(path, "#step=logits&cell=3")
    assert page.said == []
    assert re.search("NaN", page.text("#opened h3"))
    assert page.text("#facts").endswith("183 × NaN")
    assert "NaN" in page.text("#guesses tbody")
    assert "−∞" in page.page.evaluate("() => goToPlace('#layer=0&step=scores') ?? find('facts').innerText")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_biases_and_values_that_are_none(tmp_path, open_page, value):
    """What is opened is what the model made, also where 0 · NaN is NaN."""
    model = minglm.new(minglm.PRESETS["micro"].replace(n_group=1, topk_group=1), seed=1)

    def broken(name, array):
        array = array.copy()
        if name.endswith(("e_score_correction_bias", "1.mlp.experts.*.up_proj.weight")):
            array[0] = value
        return array

    path = tmp_path / "page.html"
    with np.errstate(all="ignore"):
        write_page(minglm.Model(model.config, map_arrays(broken, model.params)), [1, 2, 3, 4], path, without_bias=True)
    page = open_page(path, "#layer=1&step=biased_scores&token=0&cell=0")
    assert page.text("#opened .total td:last-child") == {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(value)]
    found = page.page.evaluate(
        """async () => {
            const found = [];
            const steps = DATA.traces[0].steps.filter((step) => step.axes.includes("T") || step.axes.includes("N"));
            for (const step of steps)
                for (const token of step.rows) {
                    const map = await (state.token = token, mapOf(0, step));
                    const value = map.value(token, 0);
                    const { total } = await opened(0, step, token, 0, 0);
                    if (Number.isNaN(value) !== Number.isNaN(total)) found.push([step.name, token, value, total]);
                }
            return found;
        }"""
    )
    assert found == []
    assert page.said == []
