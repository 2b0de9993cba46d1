"""Weights of 8 and 4 bits: every code, every rounding, the layouts of releases, and models that run on them."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import minglm
from minglm.api import Model
from minglm.config import PRESETS
from minglm.formats import smallfloats
from minglm.formats.checkpoint import load_checkpoint, save_checkpoint
from minglm.formats.smallfloats import KINDS, SmallFloats, is_small
from minglm.look.describe import describe
from minglm.look.folder import small_kind
from minglm.model import map_arrays, walk
from tests.helpers import difference, mutated, random_state
from tests.variants import MICRO, VARIANTS, Variant, random_params

F32 = np.float32
# Sizes that mxfp4 takes too, none a multiple of fp8's blocks.
WIDE = MICRO.replace(hidden_size=160, head_dim=32, intermediate_size=192, moe_intermediate_size=96)


def numbers(seed, *shape):
    return random_state(seed).standard_normal(shape).astype(F32)


def model_of(config=WIDE, seed=0):
    return Model(config.replace(eos_token_id=()), random_params(config, seed))


# -- e4m3fn ------------------------------------------------------------------------------------------------------


def fp8_values():
    """By the definition: four bits of exponent with bias 7, three of fraction; no infinity, one NaN of each sign."""
    values = []
    for code in range(127):
        exponent, fraction = code >> 3, code & 7
        values.append(fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))
    return np.array(values)


def rounded(values):
    """Through codes whose scale is 1: the row's largest number is 448."""
    row = np.array([[*values, 448.0]], F32)
    small = SmallFloats.of("fp8", row)
    assert small.scales[0, 0] == 1
    return small.astype(F32)[0, :-1]


def test_every_number_of_fp8_comes_back():
    values = fp8_values()
    assert values.max() == 448
    assert np.array_equal(rounded(values), values)
    assert np.array_equal(rounded(-values), -values)
    assert np.signbit(rounded([-0.0])[0])


def test_in_the_middle_the_even_neighbour_wins():
    values = fp8_values()
    middles = (values[:-1] + values[1:]) / 2
    even = np.where(np.arange(len(middles)) % 2 == 0, values[:-1], values[1:])
    assert np.array_equal(rounded(middles), even)
    assert np.array_equal(rounded(np.nextafter(middles.astype(F32), F32(0))), values[:-1])
    assert np.array_equal(rounded(np.nextafter(middles.astype(F32), F32(999))), values[1:])


def test_no_double_rounding():
    assert rounded([1.0629883])[0] == 1.125  # above the middle of 1 and 1.125; bfloat16 would first make it the middle


def test_rows_and_blocks_have_scales_of_their_own():
    weight = numbers(0, 300, 260) * np.exp(3 * numbers(1, 300, 1))
    rows, blocks = (SmallFloats.of(kind, weight) for kind in ("fp8", "fp8-block"))
    assert rows.scales.shape == (300, 1)
    assert np.allclose(rows.scales[:, 0], np.abs(weight).max(axis=1) / 448)
    assert blocks.scales.shape == (3, 3)
    for i, j in np.ndindex(3, 3):
        block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        assert np.isclose(blocks.scales[i, j], np.abs(block).max() / 448)
    for small in (rows, blocks):
        scale = smallfloats.spread(small.scales, weight.shape)
        allowed = np.maximum(np.abs(weight) / 16, scale * 2.0**-10) * (1 + 1e-5)
        assert (np.abs(small.astype(F32) - weight) <= allowed).all()


def test_a_row_of_zeros_and_one_of_negative_numbers():
    weight = np.stack([np.zeros(64, F32), -np.linspace(1, 7, 64, dtype=F32)])
    for kind in KINDS:
        found = SmallFloats.of(kind, weight).astype(F32)
        assert not found[0].any()
        assert np.isfinite(found).all()
        assert np.abs(found[1] - weight[1]).max() <= 1


def test_the_largest_number_may_round_beyond_448():
    """448.0001 / 1 would become NaN if it were not cut off."""
    weight = np.full((1, 32), np.nextafter(F32(448), F32(500)))
    weight[0, 0] = 1e-3
    assert np.isfinite(SmallFloats.of("fp8", weight).astype(F32)).all()
    wrong = mutated(smallfloats._to_fp8, "np.clip(weight / spread(scales, weight.shape), -LARGEST_FP8, LARGEST_FP8)",
                    "weight / spread(scales / 2, weight.shape)")  # fmt: skip
    assert np.isnan(wrong(weight, "fp8")[0].view(ml_dtypes.float8_e4m3fn).astype(F32)).any()


# -- mxfp4 -------------------------------------------------------------------------------------------------------


def test_every_number_of_mxfp4_comes_back():
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2 + [-0.0, -0.5, -1, -1.5, -2, -3, -4, -6] * 2, F32)
    for power in (-100, -3, 0, 5, 100):
        weight = np.ldexp(values, power)[None]
        small = SmallFloats.of("mxfp4", weight)
        assert small.scales[0, 0] == 127 + power
        assert np.array_equal(small.astype(F32), weight)


def test_the_low_half_of_a_byte_comes_first():
    weight = np.zeros((1, 32), F32)
    weight[0, :3] = 6, -1, 0.5
    codes = SmallFloats.of("mxfp4", weight).codes
    assert codes.shape == (1, 16)
    assert codes[0, 0] == 0b1010_0111  # −1 is 1 01 0, 6 is 0 11 1
    assert codes[0, 1] == 0b0000_0001


def test_the_better_of_two_scales_is_taken():
    """7.9 is cut off at 6 under the scale 1, and 8 under the scale 2; but then 0.5 of the others is lost."""
    lonely, alike = np.full((1, 32), 0.5, F32), np.full((1, 32), 7.5, F32)
    lonely[0, 0] = 7.0
    assert SmallFloats.of("mxfp4", lonely).scales[0, 0] == 127
    assert SmallFloats.of("mxfp4", alike).scales[0, 0] == 128
    for weight in (numbers(0, 8, 64), numbers(1, 8, 64) ** 3):
        small = SmallFloats.of("mxfp4", weight)
        error = np.square(small.astype(F32) - weight).reshape(8, 2, 32).sum(axis=-1)
        for step in (-1, 1):
            scales = np.ldexp(F32(1), small.scales.astype(int) - 127 + step)[..., None]
            codes = (weight.reshape(8, 2, 32) / scales).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(F32)
            assert (np.square(codes * scales - weight.reshape(8, 2, 32)).sum(axis=-1) >= error - 1e-6).all()


def test_very_small_and_very_large_numbers():
    row = np.array([[1.0, -0.5, 0.25, 0.0] * 8], np.float32)
    for size in (1e-30, 1e-36):
        for kind in ("fp8", "fp8-block"):
            assert (
                difference(SmallFloats.of(kind, row * np.float32(size)).astype(np.float32), row * np.float32(size))
                < 0.07
            )
    largest = np.full((1, 32), np.finfo(np.float32).max)
    for kind in KINDS:
        back = SmallFloats.of(kind, largest).astype(np.float32)
        assert np.isfinite(back).all()
        assert difference(back, largest) < 0.26


def test_mxfp4_knows_a_scale_that_is_no_number(tmp_path):
    weight = SmallFloats.of("mxfp4", np.eye(2, 32, dtype=np.float32))
    weight.scales[1] = 255
    assert np.isfinite(weight.astype(np.float32)[0]).all()
    assert np.isnan(weight.astype(np.float32)[1]).all()


def test_other_sizes_of_blocks_and_groups_are_refused(tmp_path):
    config = MICRO.replace(hidden_size=160, moe_intermediate_size=32)
    for kind, field, other in (("fp8-block", "weight_block_size", "[96, 96]"), ("mxfp4", "group_size", "16")):
        save_checkpoint(tmp_path / kind, config, random_params(config), kind)
        path = tmp_path / kind / "config.json"
        content = json.loads(path.read_text())
        place = content["quantization_config"]
        (place if field in place else place["config_groups"]["group_0"]["weights"])[field] = json.loads(other)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"config.json: quantization_config has {field} .*can be read here"):
            minglm.load(tmp_path / kind)
    content["quantization_config"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="quantization_config is 3, wanted an object"):
        minglm.load(tmp_path / kind)


def test_sizes_that_make_no_groups_are_refused():
    with pytest.raises(ValueError, match=r"multiple of 32 numbers, this weight is \[4, 48\]; take fp8"):
        SmallFloats.of("mxfp4", numbers(0, 4, 48))
    with pytest.raises(ValueError, match="mxfp4 wants rows of a multiple of 32"):
        model_of(MICRO).astype("mxfp4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_refused(kind, wrong):
    weight = numbers(0, 2, 64)
    weight[1, 5] = wrong
    with pytest.raises(ValueError, match=f"{kind} cannot hold NaN or infinity"):
        SmallFloats.of(kind, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_are_matrices_one_after_the_other(kind):
    weight = numbers(0, 3, 140, 160)
    stack = SmallFloats.of(kind, weight)
    assert (stack.shape, stack.ndim, len(stack), stack.size) == ((3, 140, 160), 3, 3, weight.size)
    for e in range(3):
        one = SmallFloats.of(kind, weight[e])
        assert np.array_equal(stack[e].codes, one.codes)
        assert np.array_equal(stack[e].scales, one.scales)
        assert np.array_equal(stack.astype(np.float64)[e], one.astype(np.float64))
    bits = 8 * stack.nbytes / stack.size
    assert bits == 4.25 if kind == "mxfp4" else 8 < bits < 8.3


# -- folders -----------------------------------------------------------------------------------------------------


def header(folder):
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_the_layout_of_releases(tmp_path, kind):
    model = model_of()
    model.save(tmp_path, kind)
    found, config = header(tmp_path), json.loads((tmp_path / "config.json").read_text())
    expert = "model.layers.1.mlp.experts.3.down_proj."
    if kind == "mxfp4":
        assert found[f"{expert}weight_packed"] == ("U8", [160, 48])
        assert found[f"{expert}weight_scale"] == ("U8", [160, 3])
        assert found["model.layers.1.self_attn.q_proj.weight"][0] == "BF16"
        assert config["quantization_config"]["format"] == "mxfp4-pack-quantized"
    else:
        scale = "weight_scale" if kind == "fp8" else "weight_scale_inv"
        assert found[f"{expert}weight"] == ("F8_E4M3", [160, 96])
        assert found[f"{expert}{scale}"] == ("F32", [160, 1] if kind == "fp8" else [2, 1])
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.shared_experts.up_proj"):
            assert found[f"model.layers.1.{name}.weight"][0] == "F8_E4M3"
        assert found["model.layers.0.mlp.gate_proj.weight"][0] == "F8_E4M3"
        assert config["quantization_config"]["quant_method"] == ("compressed-tensors" if kind == "fp8" else "fp8")
    for name in ("lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"):
        assert found[f"{name}.weight"][0] == "BF16"
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"][0] == "F32"
    left = config["quantization_config"]["modules_to_not_convert" if kind == "fp8-block" else "ignore"]
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"} <= set(left)
    assert ("model.layers.1.self_attn.q_proj" in left) == (kind == "mxfp4")
    assert not any("experts" in name and "shared" not in name for name in left)


def codes(params):
    return {n: (a.codes, a.scales) if isinstance(a, SmallFloats) else (a,) for n, a in walk(params)}


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_give_the_same_bits(tmp_path, kind):
    model = model_of().astype(kind)
    model.save(tmp_path / "a", kind)
    again = minglm.load(tmp_path / "a", kind)
    left, right = codes(model.params), codes(again.params)
    assert left.keys() == right.keys()
    for name in left:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(left[name], right[name], strict=True)), name
    wide = minglm.load(tmp_path / "a")  # as numbers
    for name, array in walk(wide.params):
        small = dict(walk(again.params))[name]
        assert np.array_equal(array, small.astype(F32)), name
    assert "quantization_config" in again.config.extra
    again.save(tmp_path / "b", "bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "b/config.json").read_text())
    assert minglm.load(tmp_path / "b", kind).params.norm.weight.dtype.name == "bfloat16"


def test_rounding_at_saving_and_at_loading_is_the_same(tmp_path):
    model = model_of()
    model.save(tmp_path / "wide")
    for kind in KINDS:
        model.save(tmp_path / kind, kind)
        left, right = (codes(minglm.load(tmp_path / name, kind).params) for name in ("wide", kind))
        for name in left:
            assert all(a.tobytes() == b.tobytes() for a, b in zip(left[name], right[name], strict=True)), name


def test_fp8_of_either_layout_stays_as_it_is(tmp_path):
    model_of().save(tmp_path, "fp8-block")
    found = minglm.load(tmp_path, "fp8").params.layers[1].mlp.experts.up_proj
    assert found.kind == "fp8-block"


def rewrite(folder, change):
    """Change the file's tensors: name -> (dtype, bytes, shape)."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    entries.pop("__metadata__", None)
    tensors = {
        name: [e["dtype"], data[8 + size + e["data_offsets"][0] : 8 + size + e["data_offsets"][1]], e["shape"]]
        for name, e in entries.items()
    }
    change(tensors)
    at, body, entries = 0, b"", {}
    for name, (dtype, content, shape) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at, body = at + len(content), body + content
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


Q = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", lambda t: t.pop(f"{Q}weight_scale"), f"missing: {Q}weight_scale .192, 1."),
        ("fp8", lambda t: t[f"{Q}weight_scale"].__setitem__(2, [1, 192]), f"wrong shape: {Q}weight_scale is .1, 192."),
        ("fp8", lambda t: t[f"{Q}weight_scale"].__setitem__(0, "I32"), f"wrong dtype: {Q}weight_scale is I32"),
        ("fp8-block", lambda t: t.pop(f"{Q}weight_scale_inv"), f"missing: {Q}weight_scale .192, 1."),
        ("fp8", lambda t: t.update({"x.weight_scale": ["F32", bytes(4), [1, 1]]}), "unexpected: x.weight_scale"),
        (
            "mxfp4",
            lambda t: t.pop("model.layers.1.mlp.experts.0.up_proj.weight_packed"),
            "missing: model.layers.1.mlp.experts.0.up_proj.weight .96, 160.",
        ),
        (
            "mxfp4",
            lambda t: t["model.layers.1.mlp.experts.0.up_proj.weight_packed"].__setitem__(2, [48, 160]),
            "wrong shape: model.layers.1.mlp.experts.0.up_proj.weight_packed is .48, 160., wanted .96, 80.",
        ),
    ],
)
def test_broken_folders_are_one_clear_error(tmp_path, kind, change, message):
    model_of().save(tmp_path, kind)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        minglm.load(tmp_path)


def test_scales_of_16_bits_are_read(tmp_path):
    model_of().save(tmp_path, "fp8")

    def halve(tensors):
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            scales = np.frombuffer(tensors[name][1], F32).astype(ml_dtypes.bfloat16)
            tensors[name][:2] = "BF16", scales.tobytes()

    rewrite(tmp_path, halve)
    found = minglm.load(tmp_path, "fp8").params.layers[1].self_attn.q_proj.weight
    assert found.scales.dtype == F32


def test_nan_codes_are_named(tmp_path):
    model_of().save(tmp_path, "fp8")

    def spoil(tensors):
        content = bytearray(tensors[f"{Q}weight"][1])
        content[77] = 0xFF
        tensors[f"{Q}weight"][1] = bytes(content)

    rewrite(tmp_path, spoil)
    for dtype in ("fp8", "float32"):
        with pytest.warns(UserWarning, match=f"NaN or infinity in {Q}weight"):
            minglm.load(tmp_path, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = minglm.load(tmp_path)
    broken = map_arrays(lambda n, a: a * F32(np.nan) if n.endswith("*.up_proj.weight") else a, model.params)
    with pytest.raises(ValueError, match="mxfp4 cannot hold NaN"):
        save_checkpoint(tmp_path / "b", model.config, broken, "mxfp4")


def test_dtypes_are_listed_in_the_error():
    with pytest.raises(ValueError, match="float32, float16, bfloat16, fp8, fp8-block, mxfp4"):
        load_checkpoint(minglm.api.find("glm-nano"), "int4")
    with pytest.raises(ValueError, match="dtype 'fp8' cannot be computed in"):
        minglm.new("micro", dtype="fp8")


def test_what_is_small():
    names = [name for name, _ in walk(random_params(MICRO, mtp_own_ends=True))]
    small = {name for name in names if is_small(name, "fp8")}
    for part in ("q_proj.weight", "experts.0.gate_proj.weight", "shared_experts.down_proj.weight"):
        assert f"model.layers.1.{'self_attn.' if 'q_' in part else 'mlp.'}{part}" in small
    assert not any(x in name for name in small for x in ("norm", "embed", "head", "bias", "mlp.gate.", "eh_proj"))
    assert {n for n in names if is_small(n, "mxfp4")} == {n for n in small if ".experts." in n}


# -- models that run on them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_book_computes_with_the_numbers_that_the_codes_mean(kind):
    small = model_of().astype(kind)
    wide = Model(small.config, map_arrays(lambda n, a: a.astype(F32), small.params))
    ids = random_state(0).randint(0, 61, (2, 9))
    assert np.array_equal(small.forward(ids).logits, wide.forward(ids).logits)
    assert np.array_equal(small.mtp(ids), wide.mtp(ids))
    with pytest.raises(ValueError, match="gradients need float32 or float64 weights"):
        small.loss_and_grads(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["micro", "tied", "all-dense", "one-pick-of-two", "no-bias", "mtp-own-ends", "no-shared"]
)
def test_the_fused_step_reads_codes(kind, name):
    config, own_ends = {**VARIANTS, "no-shared": Variant(MICRO.replace(n_shared_experts=0))}[name]
    if kind == "mxfp4":
        config = config.replace(hidden_size=64, moe_intermediate_size=32)
    model = Model(config.replace(eos_token_id=()), random_params(config, 3, mtp_own_ends=own_ends)).astype(kind)
    for prompt in ([1, 2, 3], list(range(30))):
        fast, book = model._engine("fast", 40, 1, None), model.forward([prompt]).logits[0, -1]
        assert difference(fast.feed(prompt), book) < 1e-5
    plain = model.generate([5, 6], 12)
    assert model.generate([5, 6], 12, draft=2).ids == plain.ids


def test_two_layouts_of_fp8_in_one_model_are_refused_by_the_fast_engine():
    fp8, block = (model_of().astype(kind) for kind in ("fp8", "fp8-block"))
    mixed = fp8.params.layers[1]._replace(mlp=block.params.layers[1].mlp)
    params = fp8.params._replace(layers=(fp8.params.layers[0], mixed, block.params.layers[2]))
    model = Model(fp8.config, params)
    with pytest.raises(ValueError, match="by row or by block, not both"):
        model.generate([1, 2], 3)
    assert len(model.generate([1, 2], 3, engine="numpy").ids) == 3


def test_shipped_sizes_suit_every_kind():
    for name in ("glm-tiny", "glm-nano"):
        c = PRESETS[name]
        assert all(n % 32 == 0 for n in (c.hidden_size, c.moe_intermediate_size, c.intermediate_size))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_no_array_and_say_what_makes_one(kind):
    weight = SmallFloats.of(kind, np.ones((2, 32, 32), np.float32))
    for use in (np.asarray, list, lambda each: each[0, 0], lambda each: each[0], lambda each: each[:1]):
        with pytest.raises(TypeError, match=r"SmallFloats.*holds codes and scales; \.astype\(np\.float32\) makes"):
            use(weight[1])
    assert len(list(weight)) == 2
    several = np.empty(1, object)
    several[0] = weight[1]
    assert repr(several) == f"array([SmallFloats({kind}, [32, 32])], dtype=object)"


def test_a_model_says_how_its_weights_are_kept(tmp_path):
    model = minglm.load("glm-nano")
    assert ", float32, 4 layers" in repr(model)
    for kind in ("bfloat16", *KINDS):
        model.save(tmp_path, kind)
        for small in (minglm.load(tmp_path, kind), minglm.load(tmp_path, mode="mmap"), model.astype(kind)):
            assert f" active, {kind}, 4 layers" in repr(small)
            assert f" ({kind})" in describe(small)
        assert small_kind(tmp_path) == (kind if kind in KINDS else None)
