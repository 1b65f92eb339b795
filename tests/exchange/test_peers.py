"""Both directions through the real sae-lens, eai-sparsify, dictionary-learning and neuronpedia.

`run_tests.sh --peers` runs this in an environment of its own (their pins are not ours); elsewhere
it is skipped. With `-s` it prints the measured differences as a table.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sae_lens = pytest.importorskip("sae_lens")
sparsify = pytest.importorskip("sparsify")
# Its language models need nnsight < 0.4, which needs older packages; its dictionaries do not.
sys.modules.setdefault("nnsight", types.ModuleType("nnsight")).__dict__["LanguageModel"] = object
dictionary = pytest.importorskip("dictionary_learning.dictionary")
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402 # pyright: ignore
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402 # pyright: ignore

neuronpedia_client = pytest.importorskip("neuronpedia")
from neuronpedia.np_activation import Activation  # noqa: E402 # pyright: ignore
from neuronpedia.np_explanation import Explanation  # noqa: E402 # pyright: ignore

from sae import SAEConfig, TopKSparseAutoencoder, load_sae, read_sae, save_sae  # noqa: E402
from saint.exchange.exports import WRITERS  # noqa: E402
from saint.exchange.foreign import fold, write_ours  # noqa: E402
from saint.exchange.imports import Overrides, read_foreign  # noqa: E402

D, N, K, N_ROWS = 64, 512, 16, 4000
Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw x (n, D) to which latents are active (n, N) bool and outputs (n, D)."""
TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print what was measured."""
    yield
    print("\n| path | same active sets | output, largest relative difference |\n|---|---|---|")
    print("\n".join(TABLE))


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Rows as a residual stream has them: correlated, with a mean and a few large dimensions."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 8, D) * torch.cat([torch.ones(D - 2), torch.full((2,), 6.0)])
    mix = torch.randn(D, D, generator=generator) / D**0.5
    return (torch.randn(N_ROWS, D, generator=generator) @ mix + 0.5) * scale


def compare(name: str, theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> None:
    same = float((theirs[0] == ours[0]).all(dim=1).float().mean())
    wide = theirs[1].double()
    error = (ours[1].double() - wide).norm(dim=1) / wide.norm(dim=1)
    TABLE.append(f"| {name} | {100 * same:.2f} % | {float(error.max()):.1e} |")
    assert theirs[0].any() and same >= 0.9999 and float(error.max()) <= 1e-5


def run_ours(path: Path) -> Run:
    sae = load_sae(path, device="cpu")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        active = sae.encode(sae.normalise(x)[0])
        mask = torch.zeros(len(x), N, dtype=torch.bool)
        fires = active.values > 0
        mask[active.tokens()[fires], active.indices[fires]] = True
        return mask, sae.reconstruct(x)

    return run


def run_dense(sae: Any) -> Run:
    """Of SAELens and dictionary_learning."""

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = sae.encode(x)
        return acts > 0, sae.decode(acts)

    return run


def run_sparsify(coder: Any) -> Run:
    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        acts, indices, _ = coder.encode(x)
        mask = torch.zeros(len(x), N).scatter(1, indices, acts) > 0
        return mask, coder.decode(acts, indices)

    return run


@torch.no_grad()
def shake(module: Any, *, seed: int = 0) -> None:
    """Random weights whose latents fire on some rows, whose decoder rows differ in norm.

    Biases make it sparse, as trained ones are: where half of 512 latents fire, the 1e-5 that
    SAELens adds to a token's deviation (we add 1e-6) moves one gate on 1 row of 4,000.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.named_parameters():
        draw = torch.randn(tensor.shape, generator=generator)
        if name == "threshold":
            tensor.copy_(2 + draw.abs())
        elif tensor.ndim == 2:
            tensor.copy_(draw / tensor.shape[-1] ** 0.5 if N not in draw.shape else draw / D**0.5)
        elif name == "r_mag":
            tensor.copy_(0.3 * draw)
        elif name in ("b_enc", "b_gate", "gate_bias", "encoder.bias"):
            tensor.copy_(0.5 * draw - 1.5)
        else:
            tensor.copy_(0.5 * draw)


META = {"model_name": "llama", "hook_name": "blocks.2.hook_resid_post", "prepend_bos": True}


def lens_config(kind: str, **more: Any) -> Any:
    return getattr(sae_lens, f"{kind}SAEConfig")(
        d_in=D, d_sae=N, metadata=sae_lens.saes.sae.SAEMetadata(**META), **more
    )


LENS = {
    "standard": ("Standard", {}),
    "standard, b_dec not subtracted": ("Standard", {"apply_b_dec_to_input": False}),
    "standard, layer_norm": ("Standard", {"normalize_activations": "layer_norm"}),
    "topk": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": False}),
    "topk, rescaled by norms": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "topk, layer_norm": (
        "TopK",
        {"k": K, "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"},
    ),
    "jumprelu": ("JumpReLU", {}),
    "gated": ("Gated", {}),
}


def import_and_compare(name: str, folder: Path, theirs: Run, x: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    write_ours(out, *fold(read_foreign(folder, Overrides())))
    compare(f"{name} → SAINT", theirs(x), run_ours(out)(x))


@pytest.mark.parametrize("name", LENS)
def test_saelens_in(name, x, tmp_path: Path):
    kind, more = LENS[name]
    theirs = getattr(sae_lens, f"{kind}SAE")(lens_config(kind, **more))
    shake(theirs)
    theirs.save_model(tmp_path / "lens")
    import_and_compare(f"SAELens {name}", tmp_path / "lens", run_dense(theirs), x, tmp_path)
    config, _ = read_sae(tmp_path / "ours.safetensors")
    assert config is not None and (config.layer, config.hook_point) == (3, "resid_pre")


@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK", "TopK", "JumpReLU"])
def test_saelens_as_its_trainer_saves(kind, x, tmp_path: Path):
    more: dict[str, Any] = {} if kind == "JumpReLU" else {"k": K}
    if "Matryoshka" in kind:
        more["matryoshka_widths"] = [64, 256, N]
    theirs = getattr(sae_lens, f"{kind}TrainingSAE")(
        getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=N, **more)
    )
    shake(theirs)
    with torch.no_grad():
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(3.0)
    theirs.save_inference_model(str(tmp_path / "lens"))
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "lens")
    import_and_compare(f"SAELens trained {kind}", tmp_path / "lens", run_dense(loaded), x, tmp_path)


def test_sparsify_in(x, tmp_path: Path):
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=N, k=K))
    shake(coder)
    coder.save_to_disk(tmp_path / "layers.2")
    import_and_compare("sparsify", tmp_path / "layers.2", run_sparsify(coder), x, tmp_path)


DICTIONARIES = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D, N),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, N),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, N),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, N),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, N, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, N, K),
}


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning_in(name, x, tmp_path: Path):
    theirs = DICTIONARIES[name]()
    shake(theirs)
    if name == "BatchTopKSAE":
        theirs.threshold.fill_(3.0)
    folder = tmp_path / "trainer_0"
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": name, "layer": 2, "lm_name": "llama"}})
    )
    import_and_compare(f"dictionary_learning {name}", folder, run_dense(theirs), x, tmp_path)


def make_ours(rule: str, norm: str, path: Path) -> Run:
    config = SAEConfig(
        D,
        N,
        K if "topk" in rule else 0,
        layer=3,
        activation=rule,
        threshold=3.0 if rule == "batchtopk" else None,
        normalisation=norm,
        norm_factor=0.7 if norm == "scalar" else 1.0,
        model_name="llama",
    )
    sae = TopKSparseAutoencoder(config)
    shake(sae, seed=1)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        if sae.magnitude_scale is not None:
            sae.magnitude_scale.copy_(sae.magnitude_scale.exp())
    save_sae(path, sae)
    return run_ours(path)


def load_export(tool: str, rule: str, folder: Path) -> Run:
    if tool == "saelens":
        return run_dense(sae_lens.SAE.load_from_disk(folder))
    if tool == "sparsify":
        return run_sparsify(sparsify.SparseCoder.load_from_disk(folder))
    classes = {"topk": AutoEncoderTopK, "batchtopk": BatchTopKSAE}
    names = {"relu": "AutoEncoder", "gated": "GatedAutoEncoder", "jumprelu": "JumpReluAutoEncoder"}
    chosen = classes.get(rule) or getattr(dictionary, names[rule])
    return run_dense(chosen.from_pretrained(folder / "ae.pt"))


RULES = ("topk", "batchtopk", "jumprelu", "relu", "gated")
OUT = [("saelens", rule, norm) for rule in RULES for norm in ("per_token_standardise", "none")]
OUT += [("dictionary_learning", rule, norm) for rule in RULES for norm in ("none", "scalar")]
OUT += [("sparsify", "topk", "none"), ("sparsify", "topk", "scalar"), ("saelens", "topk", "scalar")]


@pytest.mark.parametrize(("tool", "rule", "norm"), OUT)
def test_ours_out(tool, rule, norm, x, tmp_path: Path):
    ours = make_ours(rule, norm, tmp_path / "sae.safetensors")
    config, state = read_sae(tmp_path / "sae.safetensors")
    assert config is not None
    (tmp_path / "out").mkdir()
    WRITERS[tool](config, state, tmp_path / "out")
    theirs = load_export(tool, rule, tmp_path / "out")(x)
    compare(f"SAINT {rule}, {norm} → {tool}", theirs, ours(x))


class Upload(BaseHTTPRequestHandler):
    """A stand-in for Neuronpedia's upload that reads what comes with the client's own models."""

    received: list[tuple[str | None, dict[str, Any]]]
    refuse = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append((self.headers["X-Api-Key"], body))
        assert self.path == "/api/feature/upload-batch"
        assert body["modelId"] == body["modelId"].lower() and 1 <= len(body["features"]) <= 128
        for feature in body["features"]:
            assert len(feature["topLogits"]) <= 20
            assert all(len(said["text"]) <= 512 for said in feature["explanations"])
            place = {"modelId": body["modelId"], "source": body["source"], "index": "3"}
            for shown in feature["activations"]:
                assert len(shown["values"]) <= 1024
                stored = place | shown | {"binMin": shown["quantileMin"]}
                stored |= {"binMax": shown["quantileMax"]}
                stored |= {"binContains": shown["quantileFraction"]}
                read = Activation.from_np_db_json(stored)  # raises where they do not fit
                if read.quantileMin is not None and read.quantileMax is not None:
                    assert read.quantileMin <= max(read.values) <= read.quantileMax
            for said in feature["explanations"]:
                described = {"description": said["text"], "typeName": said["methodName"]}
                assert Explanation.from_np_db_json(place | described).text == said["text"]
        self.send_response(400 if type(self).refuse else 200)
        self.end_headers()
        self.wfile.write(b'{"message": "no"}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_neuronpedias_client_sends_what_we_wrote(tmp_path: Path, monkeypatch):
    from neuronpedia.requests.base_request import NPRequest  # pyright: ignore

    from saint.exchange import neuronpedia
    from saint.stage.errors import UserError

    def window(kind: str, value: float = 1.5, decile: int = 9) -> dict[str, Any]:
        shown = {"tokens": ["a", " b"], "activations": [0.0, value], "decile": decile}
        return {"kind": kind, **shown}

    class Found:
        def iter_latents(self):
            for latent in range(130):
                token = [{"token": " b", "value": 1.0}]
                yield {
                    "latent": latent, "density": 0.1, "max_activation": 1.5,
                    "n_firing_tokens": int(latent != 5), "promoted": token, "suppressed": token,
                    "examples": [
                        window("top"), window("quantile"), window("quantile", 1.25),
                        window("quantile", 0.125, 8), window("random", 0.0),
                    ],
                }  # fmt: skip

    from saint.evidence.labels import Label

    payloads = neuronpedia.batches(
        Found(),  # type: ignore[arg-type]
        {3: Label("x" * 600)},
        model_id="llama",
        source=neuronpedia.source_id(3, "saint"),
        explainer="claude",
    )
    assert neuronpedia.write_batches(tmp_path, payloads, [5]) == 2
    Upload.received = []
    server = HTTPServer(("127.0.0.1", 0), Upload)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(NPRequest, "BASE_URL", f"http://127.0.0.1:{server.server_port}/api")
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with pytest.raises(UserError, match="NEURONPEDIA_API_KEY"):
        neuronpedia.upload(tmp_path)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "key")
    Upload.refuse = True
    with pytest.raises(UserError, match="refused batch_00000"):
        neuronpedia.upload(tmp_path)
    Upload.refuse = False
    assert neuronpedia.upload(tmp_path) == 2
    assert neuronpedia.upload(tmp_path) == 2  # and sends nothing again
    server.shutdown()
    assert len(Upload.received) == 3 and {key for key, _ in Upload.received} == {"key"}
    sent = [f["index"] for _, body in Upload.received[1:] for f in body["features"]]
    assert sent == [i for i in range(130) if i != 5]
    third = Upload.received[1][1]["features"][3]
    assert len(third["activations"]) == 4 and len(third["explanations"][0]["text"]) == 512
    # Windows come as they are, with the bounds of the tenth of windows that they are in.
    assert [shown["values"] for shown in third["activations"]] == [
        [0.0, value] for value in (1.5, 1.5, 1.25, 0.125)
    ]
    bounds = [(a["quantileMin"], a["quantileMax"]) for a in third["activations"]]
    assert bounds == [(None, None), (1.25, 1.5), (1.25, 1.5), (0.125, 0.125)]
    written = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("batch_*.json"))]
    assert [body for _, body in Upload.received[1:]] == written
    assert "key" not in "".join(p.read_text() for p in tmp_path.iterdir())
