"""Import and export against other tools' formulas in float64, on files of their layouts."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

import saint_exchange
from sae import SAEConfig, TopKSparseAutoencoder, load_sae, save_sae
from saint.exchange import foreign, hub
from saint.exchange.hooks import lens_name, module_name, parse_hook
from saint.exchange.imports import Overrides, read_foreign
from saint.stage.errors import UserError
from tests.exchange import peer_files
from tests.exchange.peer_files import K
from tests.support.program import call

FOREIGN = {
    "saelens standard": lambda p: peer_files.saelens(p, "standard"),
    "saelens standard, b_dec not subtracted": lambda p: peer_files.saelens(
        p, "standard", apply_b_dec_to_input=False
    ),
    "saelens topk by norm": lambda p: peer_files.saelens(
        p, "topk", k=K, rescale_acts_by_decoder_norm=True
    ),
    "saelens topk": lambda p: peer_files.saelens(
        p, "topk", k=K, rescale_acts_by_decoder_norm=False
    ),
    "saelens topk, layer norm": lambda p: peer_files.saelens(
        p, "topk", k=K, rescale_acts_by_decoder_norm=False, normalize_activations="layer_norm"
    ),
    "saelens jumprelu": lambda p: peer_files.saelens(p, "jumprelu"),
    "saelens gated": lambda p: peer_files.saelens(p, "gated"),
    "saelens gated, b_dec not subtracted": lambda p: peer_files.saelens(
        p, "gated", apply_b_dec_to_input=False
    ),
    "sparsify": peer_files.sparsify,
    "llama_scope": peer_files.llama_scope,
    "goodfire": peer_files.goodfire,
    "gemma_scope": peer_files.gemma_scope,
} | {
    f"dictionary_learning {name}": lambda p, name=name: peer_files.dictionary_learning(p, name)
    for name in (
        *("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder"),
        "JumpReluAutoEncoder",
    )
}


def rows(n: int = 300) -> torch.Tensor:
    return 3 * torch.randn(n, peer_files.D, generator=torch.Generator().manual_seed(7))


def dense(sae: TopKSparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    active = sae.encode(sae.normalise(x)[0])
    found = torch.zeros(len(x), sae.config.n_latents)
    return found.index_put((active.tokens(), active.indices), active.values)


def assert_same(sae: TopKSparseAutoencoder, wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Active sets equal on ≥ 99.99 % of rows, activations and outputs within 1e-5."""
    found, x = dense(sae, rows()), rows()
    same = ((found > 0) == (wanted[0] > 0)).all(dim=1)
    assert float(same.float().mean()) >= 0.9999
    torch.testing.assert_close(found.double(), wanted[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sae.reconstruct(x).double(), wanted[1], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)))


def exchange(*arguments: object, fails: bool = False) -> str:
    done = call("saint_exchange", *arguments)
    assert done.returncode == int(fails), done.stderr
    return done.stderr


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_imported_sae_computes_what_its_own_tool_does(name, suffix, tmp_path: Path):
    run = FOREIGN[name](tmp_path / "theirs") if (tmp_path / "theirs").mkdir() is None else None
    out = tmp_path / f"sae{suffix}"
    layer = [] if "gemma" not in name and name != "sparsify" else ["--layer", 3]
    exchange("import", tmp_path / "theirs", "--output_path", out, *layer)
    sae = load_sae(out, device="cpu")
    assert run is not None
    assert_same(sae, run(rows().double()))
    places = {"llama_scope": 16, "goodfire": 20, "dictionary_learning": 4}
    assert sae.config.layer == places.get(name.split()[0], 3)
    assert sae.config.hook_point == "resid_pre" and sae.config.prepend_bos
    assert sae.config.source is not None and sae.config.source.split()[0] == name.split()[0]


def rule_sae(activation: str, normalisation: str) -> TopKSparseAutoencoder:
    """One of ours, of any rule; decoder directions have unit norm."""
    w = peer_files.weights(3)
    config = SAEConfig(
        peer_files.D,
        peer_files.N,
        K if activation in ("topk", "batchtopk") else 0,
        layer=4,
        activation=activation,
        threshold=0.2 if activation == "batchtopk" else None,
        normalisation=normalisation,
        norm_factor=0.4 if normalisation == "scalar" else 1.0,
        norm_eps=1e-5,
        model_name="llama",
    )
    sae = TopKSparseAutoencoder(config)
    with torch.no_grad():
        sae.W_enc.copy_(w["enc"])
        sae.W_dec.copy_(torch.nn.functional.normalize(w["dec"], dim=1))
        sae.b_enc.copy_(w["b_enc"])
        sae.b_pre.copy_(w["b_dec"])
        for name, value in (("threshold", w["threshold"]), ("magnitude_bias", w["b_mag"])):
            if getattr(sae, name) is not None:
                getattr(sae, name).copy_(value)
        if sae.magnitude_scale is not None:
            sae.magnitude_scale.copy_(w["r_mag"].exp())
    return sae.requires_grad_(False)


CARRIED = [
    (tool, rule, norm)
    for tool, rules in (
        ("saelens", ("topk", "batchtopk", "jumprelu", "relu", "gated")),
        ("sparsify", ("topk",)),
        ("dictionary_learning", ("topk", "batchtopk", "jumprelu", "relu", "gated")),
    )
    for rule in rules
    for norm in ("per_token_standardise", "none", "scalar")
    if tool == "saelens" or norm != "per_token_standardise"
]


@pytest.mark.parametrize(("tool", "rule", "norm"), CARRIED)
def test_what_is_exported_and_imported_again_is_the_same(tool, rule, norm, tmp_path: Path):
    sae = rule_sae(rule, norm)
    save_sae(tmp_path / "sae.safetensors", sae)
    exchange(
        "export", tmp_path / "sae.safetensors", "--format", tool, "--output_dir", tmp_path / "o"
    )
    exchange("import", tmp_path / "o", "--output_path", tmp_path / "again.pt")
    again = load_sae(tmp_path / "again.pt", device="cpu")
    # Activations of a scalar normalisation come back in the raw scale.
    factor = 0.4 if norm == "scalar" else 1.0
    assert_same(again, (dense(sae, rows()).double() / factor, sae.reconstruct(rows()).double()))
    assert (again.config.layer, again.config.hook_point) == (4, "resid_pre")
    assert again.config.model_name == "llama"


@pytest.mark.parametrize(
    ("tool", "rule", "norm", "message"),
    [
        ("sparsify", "jumprelu", "none", "sparsify has no jumprelu, only topk"),
        ("sparsify", "topk", "per_token_standardise", "sparsify cannot standardise tokens"),
        ("dictionary_learning", "relu", "per_token_standardise", "export --format saelens"),
    ],
)
def test_what_a_format_cannot_carry_is_refused_with_the_way_out(
    tool, rule, norm, message, tmp_path: Path
):
    save_sae(tmp_path / "sae.pt", rule_sae(rule, norm))
    out = tmp_path / "out"
    error = exchange(
        "export", tmp_path / "sae.pt", "--format", tool, "--output_dir", out, fails=True
    )
    assert message in error and not list(out.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_activations": "constant_norm_rescale"}, "cannot be computed here"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "name its factor with --norm_factor",
        ),
        ({"architecture": "matching_pursuit"}, "there is no such rule"),
        ({"architecture": "batchtopk"}, "has no threshold"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "has no equal here"),
        ({"architecture": "topk", "k": 99}, "k 99 is not between 1 and its 40"),
    ],
)
def test_what_cannot_be_computed_here_is_refused(change, message, tmp_path: Path):
    peer_files.saelens(tmp_path / "a", "standard")
    config = json.loads((tmp_path / "a" / "cfg.json").read_text()) | change
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(config))
    out = tmp_path / "o.pt"
    assert message in exchange("import", tmp_path / "a", "--output_path", out, fails=True)
    assert not out.exists()


def test_a_norm_factor_is_taken_where_saelens_leaves_it_out(tmp_path: Path):
    run = peer_files.saelens(tmp_path / "a", "standard", normalize_activations="none")
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    config["normalize_activations"] = "expected_average_only_in"
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(config))
    exchange("import", tmp_path / "a", "--output_path", tmp_path / "o.pt", "--norm_factor", 0.5)
    sae = load_sae(tmp_path / "o.pt", device="cpu")
    a, out = run(0.5 * rows().double())
    assert_same(sae, (a, out / 0.5))


def test_nothing_is_unpickled_and_damage_is_one_line(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"encoder_linear.weight": Evil()}, tmp_path / "a.pth")
    arguments = ("import", tmp_path / "a.pth", "--output_path", tmp_path / "o.pt")
    assert "never unpickled" in exchange(*arguments, fails=True)
    peer_files.goodfire(tmp_path / "g")
    path = next((tmp_path / "g").iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    assert "damaged" in exchange("import", path, "--output_path", tmp_path / "o.pt", fails=True)
    save_file({"strange": torch.ones(2)}, tmp_path / "s.safetensors")
    error = exchange("import", tmp_path / "s.safetensors", "--output_path", "o.pt", fails=True)
    assert "no known format" in error


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.22.hook_resid_pre", (22, "resid_pre")),
        ("blocks.21.hook_resid_post", (22, "resid_pre")),
        ("model.layers.21", (22, "resid_pre")),
        ("layers.3.mlp", (3, "mlp_out")),
        ("model.layers.3.input_layernorm", (3, "attn_norm")),
        ("resid_post_layer_7", (8, "resid_pre")),
        ("attention_out_layer_7", (7, "attn_out")),
        ("embed_tokens", (0, "resid_pre")),
    ],
)
def test_hooks_by_name(name, place):
    assert parse_hook(name) == place
    assert parse_hook(lens_name(*place)) == place == parse_hook(module_name(*place))


def test_memory_of_an_import_is_a_block(tmp_path: Path, monkeypatch):
    peer_files.llama_scope(tmp_path)
    monkeypatch.setattr(foreign, "BLOCK_ROWS", 7)
    config, tensors = foreign.fold(read_foreign(tmp_path, Overrides()))
    assert max(len(block) for rows in tensors.values() for block in rows.blocks()) == 7
    foreign.write_ours(tmp_path / "a.safetensors", config, tensors)
    monkeypatch.undo()
    foreign.write_ours(
        tmp_path / "b.safetensors", *foreign.fold(read_foreign(tmp_path, Overrides()))
    )
    one, two = (
        load_sae(tmp_path / name, device="cpu") for name in ("a.safetensors", "b.safetensors")
    )
    assert torch.equal(one.W_dec, two.W_dec)


def hub_cache(home: Path, repository: str, source: Path) -> None:
    """Lay a directory out as huggingface_hub's cache keeps a downloaded repository."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0123456789012345678901234567890123456789"
    shutil.copytree(source, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


def test_a_repository_of_the_hub_is_imported_offline(tmp_path: Path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run = peer_files.saelens(tmp_path / "repository" / "layer_3", "jumprelu")
    hub_cache(tmp_path, "someone/saes", tmp_path / "repository")
    found = hub.fetch("hf://someone/saes/layer_3")
    config, tensors = foreign.fold(read_foreign(found, Overrides()))
    foreign.write_ours(tmp_path / "o.safetensors", config, tensors)
    assert_same(load_sae(tmp_path / "o.safetensors", device="cpu"), run(rows().double()))
    for missing in ("hf://someone/saes/layer_9", "hf://nobody/nothing", "hf://broken"):
        with pytest.raises(UserError, match=missing.split("/")[-1]):
            hub.fetch(missing)


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub that takes a repository and one commit of plain files."""

    files: ClassVar[dict[str, bytes]] = {}
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_word"
        if type(self).refuse:
            return self.answer(403, {"error": "no rights to me"})
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            assert json.loads(body)["name"] == "mine"
            return self.answer(200, {"url": "http://127.0.0.1/me/mine", "id": "me/mine"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/models/me/mine/preupload/main":
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": told})
        assert path == "/api/models/me/mine/commit/main", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                found = base64.b64decode(line["value"]["content"])
                self.files[line["value"]["path"]] = found
        commit = {"commitUrl": "http://127.0.0.1/me/mine/commit/c", "commitOid": "c"}
        self.answer(200, commit | {"hookOutput": ""})

    def do_GET(self) -> None:
        self.answer(404, {"error": "nothing here"})

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_what_is_pushed_through_the_hubs_client_is_pulled_again(tmp_path: Path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sae = rule_sae("topk", "none")
    save_sae(tmp_path / "trained_sae.pt", sae)
    push = ["push", str(tmp_path / "trained_sae.pt"), "me/mine"]
    monkeypatch.setattr(Hub, "refuse", True)
    with pytest.raises(UserError, match="hf://me/mine: .*403"):
        saint_exchange.main(push)
    monkeypatch.setattr(Hub, "refuse", False)
    saint_exchange.main(push)
    server.shutdown()
    server.server_close()
    names = {"README.md", "trained_sae.safetensors", "trained_sae.json"}
    folders = {f"saelens/{n}" for n in ("cfg.json", "sae_weights.safetensors")}
    folders |= {f"sparsify/{n}" for n in ("cfg.json", "sae.safetensors")}
    assert set(Hub.files) == names | folders
    for name, content in Hub.files.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    hub_cache(tmp_path, "me/mine", tmp_path / "repository")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    again = tmp_path / "again.safetensors"
    saint_exchange.main(["pull", "hf://me/mine", "--output_path", str(again)])
    back = load_sae(again, device="cpu")
    assert back.config == sae.config and torch.equal(back.W_dec, sae.W_dec)
    # A folder of another tool's is none of ours.
    with pytest.raises(UserError, match="saint_exchange.py import"):
        saint_exchange.main(["pull", "hf://me/mine/saelens", "--output_path", str(again)])


def test_push_prepares_a_card_that_the_hub_reads_and_three_tools_load(tmp_path: Path):
    sae = rule_sae("topk", "none")
    sae.max_activations = torch.rand(peer_files.N)
    save_sae(tmp_path / "trained_sae.pt", sae)
    (tmp_path / "sae_evaluation.json").write_text(json.dumps({"fvu": 0.1234, "l0": 4.0}))
    out = tmp_path / "up"
    exchange("push", tmp_path / "trained_sae.pt", "me/mine", "--dry_run", out)
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: saelens" in front and 'base_model: "llama"' in front
    assert "| fvu | 0.1234 |" in card and 'SAE.load_from_disk(snapshot_download("me/mine")' in card
    back = load_sae(out / "trained_sae.safetensors", device="cpu")
    assert back.max_activations is not None and back.config == sae.config
    assert torch.equal(back.max_activations, sae.max_activations)
    for folder in ("saelens", "sparsify"):
        exchange("import", out / folder, "--output_path", tmp_path / "again.pt")
        assert torch.equal(load_sae(tmp_path / "again.pt", device="cpu").W_enc, sae.W_enc)
