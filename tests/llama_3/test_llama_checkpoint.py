import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_3 import CheckpointError, load_args, load_llama
from llama_3.model import rope_frequencies
from tests.support.llama_reference import (
    N_VOCAB,
    meta_weights,
    reference,
    save_shared,
    write_hugging_face,
    write_meta,
)
from tests.support.llama_worker import measure_load
from tests.support.program import fork

CPU = torch.device("cpu")
TOKENS = torch.arange(60)[None]


def load(model_dir: Path, dtype=torch.float32, **options):
    return load_llama(model_dir, device=CPU, dtype=dtype, **options)[0]


def error_line(model_dir: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(model_dir, **options)
    line = str(caught.value)
    assert "\n" not in line and str(model_dir) in line
    return line


def test_shards_of_either_format_give_the_same_weights(tmp_path):
    theirs = reference("llama-3.1")
    whole = load(write_meta(theirs, tmp_path / "one"))
    for model_dir in (
        write_meta(theirs, tmp_path / "two", n_files=2),
        write_hugging_face(theirs, tmp_path / "hf"),
        write_hugging_face(theirs, tmp_path / "sharded", shard_size="40KB"),
    ):
        other = load(model_dir)
        for name, weight in whole.named_parameters():
            assert torch.equal(other.get_parameter(name), weight), (model_dir, name)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2


def test_embedding_shards_split_by_columns(tmp_path):
    """Older tools split the embedding over its width."""
    theirs = reference("llama-3")
    model_dir = write_meta(theirs, tmp_path, n_files=2)
    for i in range(2):
        path = model_dir / f"consolidated.{i:02d}.pth"
        shard = torch.load(path)
        halves = meta_weights(theirs)["tok_embeddings.weight"].chunk(2, dim=1)
        torch.save(shard | {"tok_embeddings.weight": halves[i].clone()}, path)
    with torch.no_grad():
        assert torch.allclose(load(model_dir)(TOKENS), theirs(TOKENS).logits, atol=1e-4)


def test_dtype_is_converted(tmp_path):
    theirs = reference("llama-3.2").to(torch.bfloat16)
    for write in (write_meta, write_hugging_face):
        model = load(write(theirs, tmp_path / write.__name__))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.tok_embeddings.weight, theirs.model.embed_tokens.weight.float())


def test_tied_embeddings_in_metas_format(tmp_path):
    theirs = reference("llama-3.2")
    model_dir = write_meta(theirs, tmp_path)
    path = model_dir / "consolidated.00.pth"
    state = torch.load(path)
    assert load(model_dir).args.tied
    torch.save(state | {"output.weight": state["tok_embeddings.weight"]}, path)
    tied = load(model_dir)
    assert tied.args.tied and tied.output is not None
    assert tied.output.weight is tied.tok_embeddings.weight
    torch.save(state | {"output.weight": torch.randn(N_VOCAB, 48)}, path)
    assert not load(model_dir).args.tied


def test_symlinked_weights_and_ignored_tensors(tmp_path):
    theirs = reference("llama-3")
    real = write_meta(theirs, tmp_path / "real")
    state = torch.load(real / "consolidated.00.pth")
    torch.save(state | {"rope.freqs": torch.ones(6)}, real / "consolidated.00.pth")
    (tmp_path / "link").mkdir()
    for path in real.iterdir():
        (tmp_path / "link" / path.name).symlink_to(path)
    assert torch.equal(load(tmp_path / "link")(TOKENS), load(real)(TOKENS))


def test_weights_carry_no_gradient_and_loading_leaves_no_trace(tmp_path):
    model_dir = write_meta(reference("llama-3"), tmp_path)
    random_state = torch.get_rng_state()
    model = load(model_dir)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("params", "factor"),
    [
        ({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8}, 32),
        ({"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8}, 32),
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8}, 8),
        ({"dim": 3072, "n_layers": 28, "n_heads": 24, "rope_scaling_factor": 16}, 16),
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "use_scaled_rope": False}, None),
    ],
)
def test_rope_factor_of_params_json(params, factor, tmp_path):
    params = {"vocab_size": 128256, "use_scaled_rope": True} | params
    (tmp_path / "params.json").write_text(json.dumps(params))
    scaling = load_args(tmp_path).rope_scaling
    assert (scaling and scaling.factor) == factor


@pytest.mark.parametrize(
    ("shape", "ffn_dim"),
    [
        ({"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256}, 8192),
        ({"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256}, 8192),
        ({"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}, 14336),
        ({"dim": 8192, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}, 28672),
        ({"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096}, 53248),
        ({"dim": 576}, 1536),
    ],
)
def test_ffn_dim_of_the_released_models(shape, ffn_dim, tmp_path):
    params = {"n_layers": 2, "n_heads": 8, "vocab_size": 128256} | shape
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert load_args(tmp_path).ffn_dim == ffn_dim


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_frequencies_equal_transformers(factor, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    # Old files carry the base apart, under `rope_scaling`.
    old = config.to_dict()
    old.pop("rope_parameters")
    old_rope = {key: value for key, value in rope.items() if key != "rope_theta"}
    for value in (config.to_dict(), old | {"rope_theta": 500000.0, "rope_scaling": old_rope}):
        (tmp_path / "config.json").write_text(json.dumps(value))
        frequencies = rope_frequencies(load_args(tmp_path))
        assert torch.allclose(frequencies, expected, rtol=1e-6, atol=0)


def test_peak_memory_is_the_model_and_its_largest_tensor(tmp_path):
    """Counted by the kernel, mapped file pages included, in a process of its own."""
    warm_up = write_meta(reference("llama-3"), tmp_path / "small")
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 16384}
    with torch.device("meta"):
        theirs = reference("llama-3", num_hidden_layers=6, **shape, **sizes)
    theirs = theirs.to_empty(device="cpu")
    dirs = [write_meta(theirs, tmp_path / "meta"), write_hugging_face(theirs, tmp_path / "hf")]
    process = fork(measure_load, tmp_path / "result.json", warm_up, dirs)
    process.join(60)
    assert process.exitcode == 0
    largest = 16384 * 512 * 4
    for grown, size in json.loads((tmp_path / "result.json").read_text()):
        assert size > 3 * largest
        assert grown < size + 1.2 * largest, (grown / 2**20, size / 2**20)


def test_missing_and_empty_directories(tmp_path):
    assert "neither params.json nor config.json" in error_line(tmp_path)
    model_dir = write_meta(reference("llama-3"), tmp_path / "meta")
    (model_dir / "consolidated.00.pth").unlink()
    assert "no weights" in error_line(model_dir)
    model_dir = write_hugging_face(reference("llama-3"), tmp_path / "hf")
    (model_dir / "model.safetensors").unlink()
    assert "no weights" in error_line(model_dir)


def edited_config(model_dir: Path, name: str, **changes) -> str:
    path = model_dir / name
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    line = error_line(model_dir)
    assert name in line
    return line


def test_bad_configs_name_the_file_and_the_key(tmp_path):
    meta = write_meta(reference("llama-3"), tmp_path / "meta")
    assert "missing key 'dim'" in edited_config(meta, "params.json", dim=None)
    assert "n_layers" in edited_config(meta, "params.json", dim=48, n_layers="3")
    assert "4 heads" in edited_config(meta, "params.json", n_layers=3, n_kv_heads=3)
    (meta / "params.json").write_text("[1, 2]")
    assert "params.json" in error_line(meta)
    (meta / "params.json").write_text("{")
    assert "params.json" in error_line(meta)
    hf = write_hugging_face(reference("llama-3"), tmp_path / "hf")
    assert "mistral" in edited_config(hf, "config.json", model_type="mistral")
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert "yarn" in edited_config(hf, "config.json", model_type="llama", rope_parameters=yarn)


@pytest.mark.parametrize("n_files", [1, 2])
def test_bad_tensors_in_metas_format(n_files, tmp_path):
    model_dir = write_meta(reference("llama-3"), tmp_path, n_files=n_files)
    path = model_dir / f"consolidated.{n_files - 1:02d}.pth"
    state, name = torch.load(path), "layers.1.feed_forward.w2.weight"

    torch.save({k: v for k, v in state.items() if k != name}, path)
    line = error_line(model_dir)
    assert path.name in line and f"{name} is missing" in line

    torch.save(state | {"layers.1.attention.bias": torch.ones(3)}, path)
    line = error_line(model_dir)
    assert "consolidated.0" in line and "layers.1.attention.bias" in line

    torch.save(state | {name: state[name][:-1]}, path)
    line = error_line(model_dir)
    assert re.search(r"consolidated\.\d\d\.pth", line) and name in line and "[47," in line

    torch.save([1, 2], path)
    assert path.name in error_line(model_dir)


def test_bad_tensors_in_hugging_faces_format(tmp_path):
    model_dir = write_hugging_face(reference("llama-3"), tmp_path)
    path = model_dir / "model.safetensors"
    state, name = load_file(path), "model.layers.1.mlp.down_proj.weight"
    state = {k: v.clone() for k, v in state.items()}

    save_shared({k: v for k, v in state.items() if k != name}, path)
    line = error_line(model_dir)
    assert path.name in line and "is missing" in line and name in line

    save_shared(state | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, path)
    line = error_line(model_dir)
    assert path.name in line and "model.layers.0.self_attn.q_proj.bias" in line

    save_shared(state | {name: state[name].T}, path)
    line = error_line(model_dir)
    assert path.name in line and name in line and "[80, 48]" in line

    save_shared(state | {name: state[name].to(torch.int8)}, path)
    line = error_line(model_dir)
    assert path.name in line and name in line and "int8" in line


def test_files_cut_short(tmp_path):
    meta = write_meta(reference("llama-3"), tmp_path / "meta")
    path = meta / "consolidated.00.pth"
    os.truncate(path, path.stat().st_size * 2 // 3)
    for size in (path.stat().st_size, 0):
        os.truncate(path, size)
        assert "consolidated.00.pth: damaged or cut short" in error_line(meta)

    hf = write_hugging_face(reference("llama-3"), tmp_path / "hf")
    path = hf / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    line = error_line(hf)
    assert path.name in line and "cut short in tensor model.norm.weight" in line
    for size in (100, 4):
        os.truncate(path, size)
        assert "model.safetensors: cut short in its header" in error_line(hf)


def test_a_shard_that_the_index_names_is_gone(tmp_path):
    model_dir = write_hugging_face(reference("llama-3"), tmp_path, shard_size="40KB")
    path = sorted(model_dir.glob("*.safetensors"))[1]
    path.unlink()
    assert path.name in error_line(model_dir)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    model_dir = write_meta(reference("llama-3"), tmp_path / "m")

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"norm.weight": Trap()}, model_dir / "consolidated.00.pth")
    assert "consolidated.00.pth" in error_line(model_dir)
    assert not (tmp_path / "trapped").exists()


def test_too_many_layers_or_shards(tmp_path):
    model_dir = write_meta(reference("llama-3"), tmp_path)
    with pytest.raises(ValueError, match=r"n_layers must be in 1\.\.3, not 4"):
        load(model_dir, n_layers=4)
    with pytest.raises(ValueError, match="does not split over 3"):
        load(model_dir, model_parallel_size=3)
