"""Reading Claude's answers, each accounted for: labels (also in free text), tests, refusals.

Nothing here invents a label: a response is a `Label`-to-be, a refusal, or a failure with a reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saint.interpretation.ledger import Ledger, LedgerState, RequestId, parse_custom_id
from saint.stage.errors import UserError, log
from saint.stage.yaml_files import load_yaml

_MAX_LABEL_CHARS = 600
LETTERS = "ABCDE"  # of the excerpts of an intruder set
CUT_OFF = "cut off at max_tokens"


_REFUSAL = re.compile(
    r"\b(I apologi[sz]e|I['’]m sorry|I am sorry|I (can ?not|can['’]t|won['’]t|will not)"
    r"|I must decline|I['’]m (not able|unable)|I am (not able|unable)|I['’]m not comfortable)\b",
    re.IGNORECASE,
)


_NO_INPUT = re.compile(
    r"\b(no|any) (sentences?|texts?|excerpts?|examples?|input|content)\b[^.]{0,40}"
    r"\b(provided|given|included|supplied|present|to analy[sz]e|in your message|here)\b"
    r"|\b(sentences?|texts?|excerpts?|examples?|input|list) "
    r"(is|are|was|were|appears? to be|seems? to be) (empty|missing|blank)\b",
    re.IGNORECASE,
)


# Errors that the same request would meet again.
_LASTING_ERRORS = (
    "invalid_request",
    "request_too_large",
    "not_found",
    "permission",
    "authentication",
    "billing",
)


_NOT_A_LABEL = re.compile(
    r"(n/?a|none|null|nan|unknown|error|label|todo|undefined|-+|\.*|<[^>]*>|\[[^\]]*\]"
    r"|(parsing|parse) (error|failed)|no (clear |common |coherent |single )*"
    r"(pattern|semantic|theme|meaning|label)s?( found| identified)?)\.?",
    re.IGNORECASE,
)


# The pair as it stands in free text, with quotes inside the label left unescaped.
_LOOSE_PAIR = re.compile(
    r'"common_semantic"\s*:\s*"(?P<label>.*?)"\s*,\s*"certainty"\s*:\s*"?(?P<certainty>[\d.]+)',
    re.DOTALL,
)


@dataclass(frozen=True)
class Answer:
    """What became of one response.

    kind: "label", "answer" (a test's), "refusal", "empty input" (the model saw nothing to judge) or
    "failure" (of no use: to be asked again). reason: never empty for the last three.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def parse_label(response: Mapping[str, Any]) -> Answer:
    """Read a response to the explain task.

    response: {"content", …, "status"?, "stop_reason"?} as in `output/<batch id>.yaml`; older files
    have no status. A label has "common_semantic" and "certainty" (0..1, or None where unusable).
    """
    early = _not_succeeded(response)
    if early:
        return early
    content = response.get("content")
    if not isinstance(content, str) or not content.strip():
        return Answer("failure", reason="empty response")
    found = find_object(content, "common_semantic") or _loose_pair(content)
    if found is None:
        return _without_object(content, response)
    label = _one_line(found.get("common_semantic"))
    if not label or _NOT_A_LABEL.fullmatch(label):
        return Answer("failure", reason=f"no label in the answer ({label[:60]!r})")
    if len(label) > _MAX_LABEL_CHARS:
        return Answer("failure", reason=f"label of {len(label)} characters")
    fields: dict[str, Any] = {"common_semantic": label}
    fields["certainty"] = certainty(found.get("certainty"))
    if rationale := _one_line(found.get("rationale")):
        fields["rationale"] = rationale
    if isinstance(found.get("fits"), list):
        fields["fits"] = sorted({i for i in found["fits"] if type(i) is int and i > 0})
    return Answer("label", fields)


def parse_test(response: Mapping[str, Any], name: str, n: int | None = None) -> Answer:
    """Read a response to a scoring task: its `name` ("fires", "correct", "intruders").

    Numbers of excerpts become integers, sets' intruders a list of letters in the sets' order. What
    has another form, or not one answer for each of n sets, is a failure: it must not count as a
    wrong answer. n: number of excerpts, or sets; None where it is not known.
    """
    early = _not_succeeded(response)
    if early:
        return early
    content = response.get("content")
    found = find_object(content, name) if isinstance(content, str) else None
    if found is None:
        return _without_object(content if isinstance(content, str) else "", response)
    read = _letters if name == "intruders" else _numbers
    values = read(found[name], n)
    if values is None:
        return Answer("failure", reason=f'"{name}" has another form: {str(found[name])[:80]}')
    return Answer("answer", {name: values})


RATINGS = ("concept", "beginning", "fluency")


def parse_ratings(response: Mapping[str, Any]) -> Answer:
    """Read a response to the judge of steered texts: RATINGS, each 0, 1 or 2."""
    early = _not_succeeded(response)
    if early:
        return early
    content = response.get("content")
    found = find_object(content, RATINGS[0]) if isinstance(content, str) else None
    if found is None:
        return _without_object(content if isinstance(content, str) else "", response)
    values = [found.get(name) for name in RATINGS]
    if any(type(value) is not int or not 0 <= value <= 2 for value in values):
        return Answer("failure", reason=f"not ratings of 0 to 2: {str(found)[:80]}")
    return Answer("answer", dict(zip(RATINGS, values, strict=True)))


_NUMBER = re.compile(r"(?:(?:excerpt|no|number)\.?\s*)?#?\(?(\d+)(?:\.0*)?\)?[.):]?", re.IGNORECASE)
_LETTER = re.compile(
    rf"(?:set\s*\d+\s*[:.)=-]\s*)?(?:excerpt\s*)?[(\"']?([{LETTERS}])[)\"']?[.):]?", re.IGNORECASE
)
_SET = re.compile(r"(?:set[_\s]*)?(\d+)", re.IGNORECASE)


def _numbers(values: Any, n: int | None) -> list[int] | None:
    """Read 3, 3.0, "3", "3.", "#3" and "Excerpt 3"; None where one is anything else."""
    if not isinstance(values, list):
        return None
    numbers = []
    for value in values:
        match = None if isinstance(value, bool) else _NUMBER.fullmatch(str(value).strip())
        if match is None or not 1 <= int(match[1]) <= (n or math.inf):
            return None
        numbers.append(int(match[1]))
    return sorted(set(numbers))


def _letters(values: Any, n: int | None) -> list[str] | None:
    """Read "B", "b.", "(B)", "Set 1: B", in a list or by the number of the set, one for each."""
    if isinstance(values, dict):
        keys = [_SET.fullmatch(str(key).strip()) for key in values]
        if not all(keys) or sorted(int(k[1]) for k in keys if k) != list(range(1, len(keys) + 1)):
            return None
        pairs = zip(keys, values.values(), strict=True)
        values = [v for _, v in sorted((int(k[1]), v) for k, v in pairs if k)]
    if not isinstance(values, list) or (n is not None and len(values) != n):
        return None
    matches = [_LETTER.fullmatch(str(value).strip()) for value in values]
    return [m[1].upper() for m in matches if m] if all(matches) else None


# What a test's answer is called.
TEST_FIELDS = {"detect": "fires", "fuzz": "correct", "intruder": "intruders"}


def parse_answer(
    task: str, response: Mapping[str, Any], key: Mapping[str, Any] | None = None
) -> Answer:
    """Read a response to any task ("explain", "detect", "detect_control", …).

    key: what was stored with the request: its "truth" says how many answers there must be.
    """
    if task == "judge":
        return parse_ratings(response)
    name = TEST_FIELDS.get(task.removesuffix("_control"))
    truth = (key or {}).get("truth")
    if name:
        return parse_test(response, name, None if truth is None else len(truth))
    return parse_label(response)


def _not_succeeded(response: Mapping[str, Any]) -> Answer | None:
    status = response.get("status", "succeeded")
    if status != "succeeded":
        return Answer("failure", reason=f"{status}: {response.get('error') or 'no answer'}")
    if response.get("stop_reason") == "refusal":
        return Answer("refusal", reason=_one_line(response.get("content"))[:300] or "refusal")
    return None


def _without_object(content: str, response: Mapping[str, Any]) -> Answer:
    if response.get("stop_reason") == "max_tokens":
        return Answer("failure", reason=CUT_OFF)
    if _NO_INPUT.search(content[:400]):
        return Answer("empty input", reason=_one_line(content)[:300])
    if _REFUSAL.search(content[:400]):
        return Answer("refusal", reason=_one_line(content)[:300])
    return Answer("failure", reason=f"no JSON object in the answer: {_one_line(content)[:120]!r}")


def find_object(content: str, name: str) -> dict[str, Any] | None:
    """Return the last JSON object in free text that has the key `name`; None when there is none.

    Braces inside strings are no matter. Backslashes that JSON does not know (LaTeX) are kept.
    """
    starts = [match.start() for match in re.finditer(r"\{", content)]
    for text in (content, _escape_latex(content)):
        if text is not content:
            starts = [match.start() for match in re.finditer(r"\{", text)]
        for start in reversed(starts):
            if name not in text[start:]:
                continue
            try:
                value, _ = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and name in value:
                return value
    return None


_DECODER = json.JSONDecoder(strict=False)


def _escape_latex(text: str) -> str:
    return re.sub(r'\\(?!["\\/bfnrtu])|\\u(?![0-9a-fA-F]{4})', lambda m: "\\" + m.group(), text)


def _loose_pair(content: str) -> dict[str, Any] | None:
    matches = list(_LOOSE_PAIR.finditer(content))
    if not matches:
        return None
    match = matches[-1]
    return {"common_semantic": match["label"], "certainty": match["certainty"].rstrip(".")}


def _one_line(value: object) -> str:
    """A string on one line; JSON escapes that were LaTeX commands get their backslash back."""
    if not isinstance(value, str):
        return ""
    value = re.sub(r"[\f\b](?=[a-z])", lambda m: {"\f": "\\f", "\b": "\\b"}[m.group()], value)
    value = re.sub(r"\t(?=(heta|au|ext|imes|o)\b)", r"\\t", value)
    value = re.sub(r"\r(?=(ho|ight)\b)", r"\\r", value)
    value = re.sub(r"\n(?=(u|eq|abla|eg)\b)", r"\\n", value)
    return " ".join("".join(c for c in value if c.isprintable() or c.isspace()).split())


_OUT_OF = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/|out of)\s*(10|100)")


def certainty(value: object) -> float | None:
    """Read a certainty as a share, None where it is none.

    1, 0.9, "0.9", "90%" and 90 count, and what servers without schemas give: 9 and "8/10" are of
    ten, by rule, as is everything above 1 and up to 10.
    """
    if isinstance(value, str):
        text = value.strip()
        if match := _OUT_OF.fullmatch(text):
            value = float(match[1]) / float(match[2])
        else:
            try:
                value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
            except ValueError:
                return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    share = float(value)
    if 1 < share <= 100:
        share /= 10 if share <= 10 else 100
    return share if 0 <= share <= 1 else None


def record(result: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a results line's "result" into a record of `output/<batch id>.yaml`.

    Only text blocks make the content: a thinking block may come first.
    """
    if result["type"] != "succeeded":
        error = result.get("error") or {}
        inner = error.get("error", error) if isinstance(error, dict) else {}
        kind, message = inner.get("type"), inner.get("message")
        return {
            "content": None,
            "model": None,
            "input_tokens": 0,
            "output_tokens": 0,
            "status": result["type"],
            "stop_reason": None,
            "error": f"{kind}: {message}" if kind else None,
        }
    message = result.get("message") or {}
    usage = message.get("usage") or {}
    blocks = message.get("content") or []
    texts = [b.get("text", "") for b in blocks if b.get("type") == "text"]
    return {
        "content": "".join(texts),
        "model": message.get("model"),
        "input_tokens": usage.get("input_tokens", 0),
        "output_tokens": usage.get("output_tokens", 0),
        "status": "succeeded",
        "stop_reason": message.get("stop_reason"),
    }


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (custom_id, record) of one `output/<batch id>.yaml`, this version's or an older one."""
    rows = load_yaml(path)
    if rows is None:
        return
    if not isinstance(rows, dict):
        raise UserError(f"{path} is not a mapping of custom ids to responses")
    for custom_id, row in rows.items():
        if not isinstance(row, dict):
            row = {"content": row if isinstance(row, str) else None}
        yield str(custom_id), row


def failed_kind(row: Mapping[str, Any]) -> str | None:
    """Return "failed" (worth sending again), "invalid" (it would fail again) or None (answered)."""
    status = row.get("status", "succeeded")
    if status == "succeeded" or status == "unreadable":
        return None
    if status == "errored" and str(row.get("error")).startswith(_LASTING_ERRORS):
        return "invalid"
    return "failed"


def count(kinds: Iterable[str]) -> dict[str, int]:
    """Count by kind, in order of first appearance."""
    totals: dict[str, int] = {}
    for kind in kinds:
        totals[kind] = totals.get(kind, 0) + 1
    return totals


# --- all answers of a run ----------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """One parsed response, the record that it was read from, and what was stored of its request.

    key: what was shown, or a test's truth; {} for older requests. batch: the batch's id, "" where
    it was answered live.
    """

    custom_id: str
    request: RequestId
    answer: Answer
    record: dict[str, Any]
    key: Mapping[str, Any]
    batch: str


@dataclass
class AnswerSet:
    """All responses of a run.

    kept: request (whatever the attempt) -> the response that counts. kinds: what became of each
    response. usage: (model, whether it was live) -> [input tokens, output tokens].
    """

    kept: dict[str, Response] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    usage: dict[tuple[str, bool], list[int]] = field(default_factory=dict)


def _responses(
    directory: Path, ids: list[str], state: LedgerState
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (custom_id, record, batch id, "" for live) of everything that was retrieved."""
    found = 0
    for batch_id in ids:
        path = directory / f"{batch_id}.yaml"
        if not path.exists():
            log.warning("%s is not retrieved yet", batch_id)
            continue
        found += 1
        for custom_id, record in read_records(path):
            yield custom_id, record, batch_id
    for custom_id, record in state.live.items():
        yield custom_id, record, ""
    if not found and not state.live:
        raise UserError(
            f"none of the {len(ids)} batches is in {directory}: run "
            "interpret_top_sentences_retrieve_batches.py first"
        )


def read_all(directory: Path, ids: list[str], ledger: Ledger) -> AnswerSet:
    """Parse every response; of several to one request the best counts, and the later of equals.

    Raises UserError when nothing was retrieved.
    """
    answers, keys, state = AnswerSet(), RequestKeys(ledger), ledger.state()
    rank = {"failure": 0, "refusal": 1, "empty input": 1}
    for custom_id, record, batch in _responses(directory, ids, state):
        request = parse_custom_id(custom_id)
        key: Mapping[str, Any] = {}
        if request is None:
            request = RequestId("unknown", -1, custom_id, 1, "")
            answer = Answer("failure", reason="unknown custom_id")
        else:
            key = keys.of(request.intent).get(custom_id, {})
            answer = parse_answer(request.task, record, key)
        used = answers.usage.setdefault((str(record.get("model")), not batch), [0, 0])
        used[0] += int(record.get("input_tokens") or 0)
        used[1] += int(record.get("output_tokens") or 0)
        intent = state.intents.get(request.intent)
        if intent is not None and intent.superseded:
            answers.kinds.append("superseded")
            continue
        response = Response(custom_id, request, answer, record, key, batch)
        earlier = answers.kept.get(request.unit)
        if earlier is not None:
            response, other = sorted(
                (response, earlier), key=lambda r: rank.get(r.answer.kind, 2), reverse=True
            )
            answers.kinds.append("duplicate" if rank.get(other.answer.kind, 2) == 2 else "retried")
        answers.kept[request.unit] = response
    answers.kinds += [response.answer.kind for response in answers.kept.values()]
    return answers


class RequestKeys:
    """What was stored with the requests of a ledger, read an intent at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._keys: dict[str, dict[str, dict[str, Any]]] = {}

    def of(self, intent: str) -> dict[str, dict[str, Any]]:
        """The keys of an intent's requests: custom_id -> what was shown, or the truth.

        "label" is the text that a test was about (older requests only say it in the question).
        """
        if intent not in self._keys:
            there = bool(intent) and self.ledger.requests_path(intent).exists()
            self._keys[intent] = {
                row["custom_id"]: _tested_label(row["params"]) | row["key"]
                for row in (self.ledger.read_requests(intent) if there else ())
            }
        return self._keys[intent]


def _tested_label(params: Mapping[str, Any]) -> dict[str, str]:
    first, _, _ = params["messages"][0]["content"].partition("\n")
    return {"label": first[len("Label: ") :]} if first.startswith("Label: ") else {}
