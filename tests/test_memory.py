"""What does not fit into memory is refused with its size, before any of it is taken."""

import subprocess
import sys
from pathlib import Path

import pytest

import minglm
import minglm.api
from minglm.config import PRESETS
from minglm.formats import checkpoint, memory
from minglm.model import KVCache

MICRO = PRESETS["micro"]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def free(monkeypatch):
    """Call it with how many bytes the system shall have left."""
    return lambda count: monkeypatch.setattr(memory, "free_memory", lambda: count)


@pytest.fixture
def forbidden_later(monkeypatch):
    """From its call on, taking memory for weights or keys is an error."""

    def refuse(*arguments, **options):
        raise AssertionError("memory was taken")

    def begin():
        monkeypatch.setattr(minglm.api, "init_params", refuse)
        monkeypatch.setattr(checkpoint, "build", refuse)
        monkeypatch.setattr(KVCache, "__init__", refuse)

    return begin


@pytest.fixture
def forbidden(forbidden_later):
    forbidden_later()


def test_a_new_model_that_does_not_fit_is_refused_with_its_size_in_each_mode(forbidden, free):
    free(100 * 10**9)
    message = (
        r"GLM-4.5 has 356,\d{3},\d{3},\d{3} parameters: 1,4\d\d.\d GB in float32, 7\d\d.\d GB in bfloat16; 100.0 GB"
    )
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match=message + " are free: take a smaller preset, such as glm-nano or micro"):
            minglm.new("GLM-4.5", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "fp8", "mxfp4"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_its_weights_are_read(forbidden_later, free, dtype):
    folder = minglm.api.find("glm-nano")
    arrays = [array for _, array in minglm.walk(minglm.load(folder, dtype).params)]
    count, needed = sum(a.size for a in arrays), sum(a.nbytes for a in arrays)
    forbidden_later()
    free(needed)
    with pytest.raises(AssertionError, match="memory was taken"):
        minglm.load(folder, dtype)
    free(needed - 1)
    wide = dtype in ("float32", "float64")
    advice = "load with dtype='bfloat16', 'fp8' or 'mxfp4'" if wide else "take a smaller model"
    with pytest.raises(ValueError, match=rf"{count:,} parameters: .* in bfloat16.*; .* free: {advice}"):
        minglm.load(folder, dtype)


@pytest.mark.parametrize("engine", ["fast", "numpy"])
def test_keys_and_values_that_do_not_fit_are_refused(free, engine):
    model = minglm.new(MICRO.replace(eos_token_id=()))
    free(20 * MICRO.kv_bytes_per_token(4))
    assert len(model.generate([1, 2, 3], 17, engine=engine).ids) == 17
    assert model.new_cache(2, 10).batch == 2
    with pytest.raises(ValueError, match=r"keys and values of 1 × 21 tokens take 0.0 GB; .* free: ask for fewer"):
        model.generate([1, 2, 3], 18, engine=engine)
    with pytest.raises(ValueError, match=r"keys and values of 2 × 11 tokens"):
        model.new_cache(2, 11)
    with pytest.raises(ValueError, match=r"keys and values of 1 × 64 tokens"):
        model.new_cache()


def test_where_the_system_does_not_tell_nothing_is_refused(free):
    free(None)
    minglm.new("micro").new_cache()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells this way; runs there")
def test_what_is_free_is_less_than_there_is_and_more_than_nothing():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < memory.free_memory() <= total


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells this way; runs there")
def test_a_containers_limit_counts_without_what_it_keeps_of_files(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    everything = memory.free_memory()
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3500\n")
    (tmp_path / "memory.max").write_text("8000\n")
    assert memory.free_memory() == 8000 - (5000 - 3500)
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(memory.free_memory() - everything) < 0.2 * everything


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is counted on Linux only; runs there")
def test_a_process_with_a_limit_is_refused_and_not_killed():
    code = """if True:
        import resource, minglm
        from minglm.config import PRESETS
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        big = PRESETS["GLM-4.5-Air"].replace(num_hidden_layers=2)
        for use in (lambda: minglm.new(big), lambda: minglm.new("micro").new_cache(10**7)):
            try:
                use()
            except ValueError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        left = float(line.split("; ")[1].split()[0])
        assert 0 < left < 4.3, line
