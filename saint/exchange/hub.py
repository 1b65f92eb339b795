"""The Hugging Face hub: SAEs from there, ours to there with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae import SAEConfig
from saint.exchange.hooks import lens_name
from saint.stage.errors import UserError

PREFIX = "hf://"


def fetch(source: str, *, nested: bool = True) -> Path:
    """Return the local directory of `hf://owner/repo[/folder][@revision]`, downloading it.

    Only that folder is fetched, without the folders in it unless nested. HF_HUB_OFFLINE=1 takes
    what the hub's own cache has. Raises UserError where huggingface_hub is missing, or there is no
    such repository or folder.
    """
    address, _, revision = source.removeprefix(PREFIX).partition("@")
    owner, _, rest = address.strip("/").partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name:
        raise UserError(f"{source}: expected hf://owner/repository, with a folder behind it or not")
    hub = _hub()
    inside = f"{folder}/" if folder else ""
    patterns = {"allow_patterns": [f"{inside}*"]}
    if not nested:
        patterns["ignore_patterns"] = [f"{inside}*/*"]
    repository = f"{owner}/{name}"
    try:
        found = hub.snapshot_download(repository, revision=revision or None, **patterns)
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, ValueError) as error:
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from None
    directory = Path(found) / folder
    if not directory.exists():
        raise UserError(f"{source}: the repository has no {folder}")
    return directory


def push(
    repository: str, config: SAEConfig, sae_path: Path, directory: Path, facts: Mapping[str, Any]
) -> str:
    """Upload a prepared directory with its card; returns the address. Raises UserError."""
    hub = _hub()
    (directory / "README.md").write_text(model_card(config, sae_path.name, repository, facts))
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(directory))
    except (hub.errors.HfHubHTTPError, ValueError) as error:
        raise UserError(f"hf://{repository}: {str(error).splitlines()[0]}") from None
    return f"hf://{repository}"


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'saint-sae[remote]'") from None
    return huggingface_hub


def model_card(config: SAEConfig, file_name: str, repository: str, facts: Mapping[str, Any]) -> str:
    """Return README.md: front matter as the hub reads it, metrics, and how to load in three tools.

    facts: `evaluation` (sae_evaluation.json), `curve` (a picture's file name) and `formats`, the
    folders beside the file; all may be missing.
    """
    front = ["---", "library_name: saelens", "tags:", "- sparse-autoencoder", "- saint"]
    if config.model_name:
        front.append(f"base_model: {json.dumps(config.model_name)}")
    place = "unknown" if config.layer is None else lens_name(config.layer, config.hook_point)
    rows = {
        "language model": config.model_name or "unknown",
        "reads": f"`{place}` (layer {config.layer}, {config.hook_point}; 0-based)",
        "latents × d_model": f"{config.n_latents:,} × {config.d_model:,}",
        "rule": f"{config.activation}, k {config.k}" if config.k else config.activation,
        "normalisation": config.normalisation,
        "BOS": "prepended, never trained on" if config.prepend_bos else "none",
    }
    measured = facts.get("evaluation") or {}
    for name in (
        "fvu",
        "l0",
        "dead_share",
        "loss_recovered",
        "ce_clean",
        "ce_sae",
        "kl_divergence",
    ):
        if name in measured:
            rows[name] = f"{measured[name]:.4g}"
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    curve = [f"![training curve]({facts['curve']})"] if facts.get("curve") else []
    usage = [
        "```bash",
        f"python saint_exchange.py pull hf://{repository} --output_path {file_name}  # SAINT",
        "```",
        "```python",
    ]
    formats = facts.get("formats") or ()
    download = f'snapshot_download("{repository}")'
    usage.append("from huggingface_hub import snapshot_download")
    if "saelens" in formats:
        usage += [
            "from sae_lens import SAE  # SAELens",
            f'sae = SAE.load_from_disk({download} + "/saelens")',
        ]
    if "sparsify" in formats:
        usage += [
            "from sparsify import SparseCoder  # sparsify",
            f'sae = SparseCoder.load_from_disk({download} + "/sparsify")',
        ]
    usage += [
        "from safetensors.torch import load_file  # anything else",
        f'tensors = load_file({download} + "/{file_name}")  # the rule is in the .json beside it',
        "```",
    ]
    title = f"# Sparse autoencoder of {config.model_name or 'a language model'}, {place}"
    parts = ["\n".join([*front, "---"]), title, "\n".join(table), *curve, "\n".join(usage)]
    return "\n\n".join(parts) + "\n"
