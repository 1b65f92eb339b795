"""What Neuronpedia takes: batches of features with activations, logits, density and explanations.

Formats and limits are those of its client (neuronpedia 1.2): `FeatureRequest.upload_batch`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from saint.evidence.file import Evidence
from saint.evidence.labels import Label
from saint.stage.errors import UserError, log
from saint.stage.files import write_json, write_text

MAX_FEATURES, MAX_LOGITS, MAX_EXPLANATION, MAX_TOKENS = 128, 20, 512, 1024
_METHOD = "saint"


def source_id(layer: int, source_set: str) -> str:
    """Return `{layer}-{set}`. Raises UserError for a set that Neuronpedia would not take."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", source_set):
        raise UserError(f"--source_set {source_set!r}: lower case letters, digits, - and _ only")
    return f"{layer}-{source_set}"


def feature(row: Mapping[str, Any], label: Label | None, explainer: str) -> dict[str, Any]:
    """Return one latent as `upload_batch` sends it. row: of the evidence file."""
    windows = [e for e in row["examples"] if e["kind"] in ("top", "quantile")]
    bounds = _bounds(windows)
    explanations = []
    if label is not None and label.text:
        said = {"text": label.text[:MAX_EXPLANATION], "methodName": _METHOD, "modelName": explainer}
        explanations.append(said)
    return {
        "index": row["latent"],
        "density": row["density"],
        "activations": [_activation(window, bounds) for window in windows],
        "explanations": explanations,
        "topLogits": _logits(row["promoted"]),
        "bottomLogits": _logits(row["suppressed"]),
    }


def _bounds(windows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """Return each decile's least and largest activation: tenths of windows, not of the scale."""
    deciles: dict[int, list[float]] = {}
    for window in windows:
        if window["kind"] == "quantile":
            deciles.setdefault(window["decile"], []).append(max(window["activations"]))
    return {decile: (min(found), max(found)) for decile, found in deciles.items()}


def _activation(
    window: Mapping[str, Any], bounds: Mapping[int, tuple[float, float]]
) -> dict[str, Any]:
    """bounds: of the deciles. A window among the strongest has none."""
    known = window["kind"] == "quantile"
    low, high = bounds[window["decile"]] if known else (None, None)
    return {
        "tokens": list(window["tokens"])[:MAX_TOKENS],
        "values": [float(a) for a in window["activations"]][:MAX_TOKENS],
        "quantileMin": low,
        "quantileMax": high,
        "quantileFraction": 0.1 if known else None,
    }


def _logits(tokens: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tokens:
        return None
    return [{"token": t["token"], "value": t["value"]} for t in tokens[:MAX_LOGITS]]


def batches(
    evidence: Evidence, labels: Mapping[int, Label], *, model_id: str, source: str, explainer: str
) -> Iterator[dict[str, Any]]:
    """Yield payloads of at most MAX_FEATURES features, without the latents that never fire."""
    features: list[dict[str, Any]] = []
    for row in evidence.iter_latents():
        if not row["n_firing_tokens"]:
            continue
        features.append(feature(row, labels.get(row["latent"]), explainer))
        if len(features) == MAX_FEATURES:
            yield {"modelId": model_id, "source": source, "features": features}
            features = []
    if features:
        yield {"modelId": model_id, "source": source, "features": features}


def dead_latents(evidence: Evidence) -> list[int]:
    """Return the latents that never fire, which Neuronpedia does not take."""
    summary = evidence.summary().to_pydict()
    pairs = zip(summary["latent"], summary["n_firing_sentences"], strict=True)
    return [latent for latent, n in pairs if not n]


def write_batches(directory: Path, payloads: Iterator[dict[str, Any]], dead: list[int]) -> int:
    """Write `batch_00000.json`, … and `left_out.json`; returns how many batches there are."""
    n = 0
    for n, payload in enumerate(payloads, start=1):
        # Not indented: that is ten times slower, and a machine reads it.
        text = json.dumps(payload, ensure_ascii=False)
        write_text(directory / f"batch_{n - 1:05d}.json", text)
    write_json(directory / "left_out.json", {"dead_latents": dead})
    return n


def upload(directory: Path) -> int:
    """Send the batches of a directory with Neuronpedia's client; returns how many.

    The client takes the key from NEURONPEDIA_API_KEY, and with USE_LOCALHOST=true sends to
    http://localhost:3000/api. What was sent is noted in `uploaded.json`: a second call goes on
    behind it. Raises UserError where the client is missing or refuses.
    """
    try:
        from neuronpedia.np_activation import Activation  # pyright: ignore
        from neuronpedia.np_explanation import Explanation  # pyright: ignore
        from neuronpedia.np_feature import Feature, Logit  # pyright: ignore
        from neuronpedia.requests.base_request import NPKeyMissingError  # pyright: ignore
        from neuronpedia.requests.feature_request import FeatureRequest  # pyright: ignore
    except ImportError:
        raise UserError("--upload needs Neuronpedia's client: pip install neuronpedia") from None
    noted = directory / "uploaded.json"
    sent = set(json.loads(noted.read_text())) if noted.exists() else set()
    try:
        client = FeatureRequest()
    except NPKeyMissingError as error:
        raise UserError(f"no key for Neuronpedia: set NEURONPEDIA_API_KEY ({error})") from None

    def logits(found: list[dict[str, Any]] | None) -> list[Any] | None:
        return None if found is None else [Logit(**pair) for pair in found]

    def as_feature(said: dict[str, Any], where: dict[str, str]) -> Any:
        place = where | {"index": said["index"]}
        texts = said["explanations"]
        return Feature(
            **place,
            density=said["density"],
            top_logits=logits(said["topLogits"]),
            bottom_logits=logits(said["bottomLogits"]),
            explanations=[
                Explanation(
                    **place, text=t["text"], method=t["methodName"], explainer_model=t["modelName"]
                )
                for t in texts
            ],
            activations=[Activation(**place, **found) for found in said["activations"]],
        )

    for path in sorted(directory.glob("batch_*.json")):
        if path.name in sent:
            continue
        payload = json.loads(path.read_text())
        where = {name: payload[name] for name in ("modelId", "source")}
        features = [as_feature(said, where) for said in payload["features"]]
        try:
            with redirect_stdout(sys.stderr):  # the client prints
                client.upload_batch(payload["modelId"], payload["source"], features)
        except Exception as error:  # the client raises bare exceptions of its own and requests'
            raise UserError(f"Neuronpedia refused {path.name}: {error}") from None
        sent.add(path.name)
        write_json(noted, sorted(sent))
        log.info("sent %s (%d features)", path.name, len(features))
    return len(sent)
