"""A steering vector in plain transformers does what the demo does."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from saint.stage.errors import UserError
from saint.steering.settings import Setting
from saint.steering.studio import build_edits
from saint.steering.vector import export_vector
from tests.support.tiny_steering import (
    make_sae,
    make_studio,
    one_thread,
    write_model,
    write_tokenizer,
)

PROMPT = "Senior diplomats met to discuss"


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


def test_ten_lines_of_transformers_give_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    n_vocab = write_tokenizer(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=n_vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    studio = make_studio(tmp_path / "model")[0]
    settings = [Setting(3, "add", 1.5), Setting(5, "add", -0.5)]
    (tmp_path / "steering.safetensors").write_bytes(export_vector(studio, settings))

    with safe_open(tmp_path / "steering.safetensors", "pt") as file:
        vector, layer = file.get_tensor("vector"), int(file.metadata()["layer"])

    def steer(module, args):
        x = args[0]
        shift = x.float().std(-1, keepdim=True) * vector.to(x.device)
        if x.shape[1] > 1:
            shift[:, 0] = 0  # the BOS token
        return (x + shift.to(x.dtype), *args[1:])

    model.model.layers[layer].register_forward_pre_hook(steer)
    ids = torch.tensor([studio.encode(PROMPT, chat=False)])
    with torch.no_grad():
        theirs = model(ids).logits
    edits = build_edits(studio, settings, where="both", prompt_lengths=[99])
    ours = studio.model(ids, edits=edits)
    assert (ours - studio.model(ids)).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_metadata_and_refusals(tmp_path):
    studio = make_studio(write_model(tmp_path / "model"), make_sae(), make_sae(layer=2))[0]
    data = export_vector(studio, [Setting(3, "add", 1.5)])
    dictionary = studio.dictionaries[0]
    expected = 1.5 * dictionary.units[3] * dictionary.sae.W_dec[3]
    torch.testing.assert_close(load(data)["vector"], expected)
    (tmp_path / "v").write_bytes(data)
    with safe_open(tmp_path / "v", "pt") as file:
        meta = file.metadata()
    assert (meta["layer"], meta["hook_point"]) == ("1", "resid_pre")
    assert json.loads(meta["steer"]) == ["0:3=add:1.5"] and json.loads(meta["strength"]) == [1.5]
    for settings, message in (
        ([], "nothing to export"),
        ([Setting(3, "ablate")], "only “add”"),
        ([Setting(3), Setting(3, sae=1)], "one SAE"),
    ):
        with pytest.raises(UserError, match=message):
            export_vector(studio, settings)
