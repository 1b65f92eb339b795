"""SAINT's export, loaded and computed by SAELens, beside what `sae_evaluation.py` wrote.

    .venv-bench/bin/python -m benchmarks.peers_evaluate --model_dir M --dataset_dir D \
        --sae_model_path trained_sae.pt --evaluation_path sae_evaluation.json

`run_tests.sh --peers` makes .venv-bench (and `pip install tiktoken fsspec` there). The SAE is
exported to a temporary directory, loaded with `SAE.load_from_disk`, and SAELens's own encode and
decode give the metrics that SAEBench calls core, in memory and on the same held-out sentences:
L0, FVU, cross-entropy with its output in place of the activation, and the share that it recovers
of what the mean activation loses. With --probe_sets, sae-probes 0.4 finds the k latents that tell a
data set's two classes apart and fits its logistic probe on them, beside one on the raw activations;
it brings its 113 data sets along, and gets a local model in place of one of the hub. It wants old
pandas and pyarrow, which it does not need for this: `pip install --no-deps sae-probes==0.4.2
scikit-learn joblib threadpoolctl zstandard xgboost-cpu`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_3 import HookPoint, Llama, Tokenizer, load_llama, load_tokenizer
from sae import read_sae
from saint.capture.packing import Pack
from saint.evaluation.faithfulness import held_out_sentences, predicting
from saint.exchange.exports import export_saelens
from saint.exchange.hooks import lens_name
from saint.store.dataset import open_dataset


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SAELens's metrics of an SAE beside ours.")
    parser.add_argument("--model_dir", type=Path, required=True, help="Llama weights")
    parser.add_argument("--dataset_dir", required=True, help="the sentences' parquet files")
    parser.add_argument("--sae_model_path", type=Path, required=True, help="the trained SAE")
    parser.add_argument("--evaluation_path", type=Path, required=True, help="ours, as JSON")
    parser.add_argument("--num_samples", type=int, default=500, help="sentences [%(default)s]")
    parser.add_argument(
        "--probe_sets", nargs="*", default=[], metavar="NAME", help="data sets of sae-probes [none]"
    )
    args = parser.parse_args(argv)
    compare(args)


@torch.inference_mode()
def compare(args: argparse.Namespace) -> None:
    """Print both columns."""
    from sae_lens import SAE  # pyright: ignore

    config, state = read_sae(args.sae_model_path)
    assert config is not None and config.layer is not None, "a bare state dict says too little"
    with tempfile.TemporaryDirectory() as folder:
        export_saelens(config, state, Path(folder))
        theirs = SAE.load_from_disk(folder)
    model, tokenizer = load_llama(args.model_dir, device=torch.device("cpu"), dtype=torch.float32)
    hook = HookPoint(config.layer, config.hook_point)
    dataset = open_dataset(args.dataset_dir, text_column="text")
    sentences = held_out_sentences(
        dataset,
        load_tokenizer(args.model_dir),
        config,
        args.num_samples,
        seed=42,
        batch_tokens=2048,
    )
    found = metrics(model, theirs, hook, sentences)
    ours = json.loads(args.evaluation_path.read_text())
    for name, value in found.items():
        print(f"{name:>15}  SAELens {value:.5f}  SAINT {ours.get(name, float('nan')):.5f}")
    said: dict[str, Any] = {"saelens": found, "saint": {name: ours.get(name) for name in found}}
    if args.probe_sets:
        local = LocalModel(model, tokenizer, hook, bos=config.prepend_bos)
        said["sae_probes"] = probes(
            local, theirs, lens_name(hook.layer, hook.name), args.probe_sets
        )
    print(json.dumps(said))


def metrics(model: Llama, theirs: Any, hook: HookPoint, packs: list[Pack]) -> dict[str, float]:
    """Return what SAELens's encode and decode give; FVU on standardised tokens, as ours."""
    rows = torch.cat(
        [model.capture(p.tokens, [hook], seq_lens=p.seq_lens)[hook][p.own].float() for p in packs]
    )
    acts = theirs.encode(rows)
    output = theirs.decode(acts)
    std, mean = torch.std_mean(rows, dim=1, keepdim=True)
    z, z_hat = (rows - mean) / std, (output - mean) / std
    unexplained = (z_hat - z).double().square().sum()
    found = {
        "fvu": float(unexplained / (z - z.mean(0)).double().square().sum()),
        "l0": float((acts > 0).sum(1).double().mean()),
    }
    average = rows.mean(0)
    sums, n = torch.zeros(3, dtype=torch.float64), 0

    def with_theirs(x: Tensor) -> Tensor:
        return theirs(x.float()).to(x.dtype)

    for packed in packs:
        wanted, own = predicting(packed), packed.own.unsqueeze(-1)
        targets = packed.tokens.roll(-1)[wanted]

        def run(replace: Callable[[Tensor], Tensor], packed: Pack = packed, own: Tensor = own):
            edits = {hook: lambda x, _: torch.where(own, replace(x), x)}  # BOS stays
            return model(packed.tokens, edits=edits, seq_lens=packed.seq_lens)

        for i, replace in enumerate((lambda x: x, with_theirs, lambda x: average.expand_as(x))):
            loss = F.cross_entropy(run(replace)[wanted], targets, reduction="sum")
            sums[i] += loss.double()
        n += len(targets)
    clean, with_sae, ablated = (sums / n).tolist()
    share = (ablated - with_sae) / (ablated - clean)
    return found | {"ce_clean": clean, "ce_sae": with_sae, "loss_recovered": share}


class Batch(dict[str, Tensor]):
    """What a tokenizer of transformers returns, as far as sae-probes uses it."""

    def to(self, device: str) -> Batch:
        """Stay where it is."""
        assert device == "cpu"
        return self


class LocalModel:
    """One of our models in the place of sae-probes' HookedTransformer."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, hook: HookPoint, *, bos: bool) -> None:
        self.model, self.hook, self.bos = model, hook, bos
        self.encode = tokenizer.encode
        self.tokenizer = self  # it sets sides of padding and truncation here

    def __call__(self, text: str | list[str], *, max_length: int = 1024, **_: Any) -> Batch | dict:
        """Tokenise as sae-probes asks: the last max_length tokens, padded on the right."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text, bos=self.bos)}
        rows = [self.encode(one, bos=self.bos)[-max_length:] for one in text]
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return Batch(input_ids=padded)

    def run_with_cache(self, tokens: Tensor, *, names_filter: list[str], **_: Any) -> Any:
        """Return (nothing, the activations by name); what stands after a text changes none."""
        return None, {names_filter[0]: self.model.capture(tokens, [self.hook])[self.hook].float()}


def probes(local: LocalModel, theirs: Any, hook_name: str, names: list[str]) -> dict[str, Any]:
    """Return sae-probes' test AUC of each data set, on 1 and 16 latents and on raw activations."""
    # The package has functions of these names, too.
    evals = importlib.import_module("sae_probes.run_sae_evals")
    baselines = importlib.import_module("sae_probes.run_baselines")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        about = {"model_name": "local", "hook_name": hook_name, "model_cache_path": folder}
        ensure = evals.ensure_dataset_activations
        ensure(
            model_name="local",
            dataset_short_names=names,
            hook_names=[hook_name],
            model_cache_path=folder,
            device="cpu",
            model=local,
        )
        for name in names:
            rule = {"reg_type": "l1", "setting": "normal"}
            evals.run_sae_eval(
                theirs, name, device="cpu", ks=[1, 16], results_path=folder, **rule, **about
            )
            path = evals.get_save_metrics_path(
                name, hook_name, "l1", "local", folder, setting="normal"
            )
            rows = json.loads(path.read_text())
            found[name] = {f"auc_{row['k']}": row["test_auc"] for row in rows}
            baselines.run_baseline_dataset_layer(
                numbered_dataset=name, method_name="logreg", results_path=folder, **about
            )
            raw = baselines.get_baseline_save_path(
                dataset=name,
                hook_name=hook_name,
                method_name="logreg",
                model_name="local",
                results_path=folder,
            )
            found[name]["auc_raw"] = json.loads(raw.read_text())[0]["test_auc"]
            print(f"{name:>30}  {found[name]}")
    return found


if __name__ == "__main__":
    main()
