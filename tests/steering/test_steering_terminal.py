"""The terminal's twin of the steering page, run as a program."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

import llama_3_inference_text_completion as terminal
from saint.stage.errors import UserError
from saint.stage.terminal import visible
from saint.steering.completions import complete_pairs
from saint.steering.dose import DEFAULT_STRENGTHS, dose_request, sweep
from saint.steering.search import search_text, search_token
from saint.steering.settings import Request, Setting, request_from_json
from saint.steering.vector import export_vector
from tests.support import program
from tests.support.tiny_steering import (
    LABELS,
    make_sae,
    make_studio,
    one_thread,
    write_model,
    write_setup,
)

PROMPT = "Senior diplomats met to discuss"
NUCLEAR, COURT = Setting(3, "add", 1.5), Setting(5, "ablate", 0.0)


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return write_setup(tmp_path_factory.mktemp("terminal"))


@pytest.fixture(scope="module")
def loaded(setup):
    """The studio and guides that the program loads: the saved SAE is this one."""
    return make_studio(setup[0])


def run(setup, *flags):
    command = ["--device", "cpu", "--dtype", "float32", "--llama_model_dir", setup[0]]
    return program.call(
        "llama_3_inference_text_completion", *command, "--sae_model_path", setup[1], *flags
    )


def succeed(setup, *flags):
    done = run(setup, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_prints_what_the_library_computes(setup, loaded):
    flags = ("--prompt", PROMPT, "--steer", "3=+1.5", "5=off", "--max_new_tokens", "5")
    record = json.loads(succeed(setup, *flags, "--json"))
    request = request_from_json(record["request"])
    assert request.settings == (NUCLEAR, COURT)
    (pair,) = complete_pairs(loaded[0], request)
    assert record["pairs"][0]["steered"]["text"] == pair.steered.text
    assert record["pairs"][0]["effects"][0]["realised"] == pytest.approx(pair.effects[0].realised)
    shown = succeed(setup, *flags)
    assert visible(pair.plain.text) in shown and visible(pair.steered.text) in shown
    assert f"latent 3 {LABELS[3]}: {pair.effects[0].present:.2f} → target" in shown


def test_request_file_gives_the_pair_that_it_was_saved_with(setup, loaded, tmp_path):
    request = Request((PROMPT, "the court"), (NUCLEAR,), "generated", 6, 0.9, 0.8, 11)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(request.to_json()))
    record = json.loads(succeed(setup, "--request", path, "--json"))
    assert request_from_json(record["request"]) == request
    expected = complete_pairs(loaded[0], request)
    assert [p["steered"]["text"] for p in record["pairs"]] == [p.steered.text for p in expected]
    # The page copies the request with its results around it.
    path.write_text(json.dumps({"request": request.to_json(), "results": []}))
    copied = json.loads(succeed(setup, "--request", path, "--json"))
    assert copied == record


def test_the_pages_limits_are_not_the_terminals(tmp_path, capsys):
    """More prompts, characters, tokens and latents than the page takes; the context still binds."""
    model_dir, sae_path = write_setup(tmp_path)
    write_model(model_dir, max_seq_len=8192)
    argv = ["--llama_model_dir", str(model_dir), "--sae_model_path", str(sae_path)]
    argv += ["--device", "cpu"]
    page = make_studio(model_dir)[0]
    beyond = (
        ({"prompts": ("the",) * 9}, "9 prompts"),
        ({"prompts": ("the " * 1100,)}, "characters"),
        ({"prompts": ("the " * 700,) * 4}, "tokens: at most 2560 .*--max_total_tokens"),
        ({"settings": tuple(Setting(i, "add", 0.1) for i in range(33))}, "33 steered latents"),
    )
    for changes, message in beyond:
        with pytest.raises(UserError, match=message):
            page.encode_prompts(replace(Request(("the",)), **changes))
        request = replace(Request(("the",), max_new_tokens=2), **changes)
        path = tmp_path / "settings.json"
        path.write_text(json.dumps({"request": request.to_json()}))
        terminal.main([*argv, "--request", str(path), "--json"])
        assert len(json.loads(capsys.readouterr().out)["pairs"]) == len(request.prompts)
    terminal.main([*argv, "--prompt", "the", "--max_new_tokens", "257", "--json"])
    assert capsys.readouterr().out
    with pytest.raises(UserError, match="context of 8192"):
        terminal.main([*argv, "--prompt", "the " * 8192])


@pytest.mark.parametrize("find", ["label", "token", "text"])
def test_finding(setup, loaded, find):
    query = {"label": "nuclear", "token": "court", "text": PROMPT}[find]
    rows = json.loads(succeed(setup, f"--find_{find}", query, "--json"))
    if find == "label":
        assert [(row["latent"], row["label"]) for row in rows] == [(3, LABELS[3])]
    else:
        hits = (search_token if find == "token" else search_text)(loaded[0], loaded[1], query)
        assert [row["latent"] for row in rows] == [hit.latent for hit in hits] and rows
        assert [row["reason"] for row in rows] == [hit.reason for hit in hits]
    shown = succeed(setup, f"--find_{find}", query).splitlines()
    assert [line.split()[0] for line in shown] == [f"{r['sae']}:{r['latent']}" for r in rows]


def test_finding_nothing_says_so(setup):
    assert succeed(setup, "--find_label", "zeppelin").startswith("nothing found; --find_token")


def test_dose_report_of_every_latent_honours_where_and_chat(setup, loaded, tmp_path):
    wanted = Request((PROMPT,), (NUCLEAR, Setting(5, "set", 1.0)), "generated", seed=4, chat=True)
    flags = ["--prompt", PROMPT, "--steer", "3=+1.5", "5=1", "--seed", "4", "--chat"]
    flags += ["--where", "generated", "--dose_report"]
    shown = succeed(setup, *flags, tmp_path / "dose.json")
    reports = json.loads((tmp_path / "dose.json").read_text())
    for report, setting in zip(reports, wanted.settings, strict=True):
        *_, expected = sweep(loaded[0], setting, dose_request(loaded[0], wanted))
        assert report == json.loads(json.dumps(expected.to_json()))
        assert len(report["points"]) == len(DEFAULT_STRENGTHS)
        assert f"{LABELS[setting.latent]} (#{setting.latent}): {expected.verdict}" in shown
    elsewhere = dose_request(loaded[0], replace(wanted, where="prompt"))
    *_, other = sweep(loaded[0], NUCLEAR, elsewhere)
    assert reports[0]["points"] != json.loads(json.dumps(other.to_json()))["points"]


def test_dose_report_as_a_page(setup, tmp_path):
    succeed(setup, "--prompt", PROMPT, "--steer", "3=+1", "--dose_report", tmp_path / "dose.html")
    page = (tmp_path / "dose.html").read_text()
    assert page.count("<svg") == 2 and LABELS[3] in page and "://" not in page
    done = run(setup, "--dose_report", tmp_path / "none.html")
    assert done.returncode == 1 and done.last_line.startswith("error: --dose_report needs --steer")


def test_export_vector(setup, loaded, tmp_path):
    path = tmp_path / "steering.safetensors"
    done = run(setup, "--steer", "3=+1.5", "9=-0.5", "--export_vector", path)
    assert done.returncode == 0 and f"wrote {path}" in done.stderr
    expected = load(export_vector(loaded[0], (NUCLEAR, Setting(9, "add", -0.5))))
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("vector"), expected["vector"])
        assert file.metadata()["layer"] == "1"
    done = run(setup, "--steer", "3=off", "--export_vector", tmp_path / "none")
    assert done.returncode == 1 and "only “add”" in done.last_line
    assert not (tmp_path / "none").exists()


def test_errors_are_one_line(setup):
    done = run(setup, "--request", "nowhere.json")
    assert done.returncode == 1 and done.last_line.endswith("--request nowhere.json does not exist")
    done = run(setup, "--prompt", "a", "--steer", "64=+1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.last_line == "error: latent 64: this SAE has 0 to 63"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steer", "abc"), "expected LATENT"),
        (("--sae_layer_idx", "3"), "layer"),
        (("--sae_layer_idx", "1", "2"), "2 values for 1 SAEs"),
        (("--labels_path", "nowhere.yaml"), "nowhere.yaml"),
        (("--evidence_path", "nowhere.parquet"), "nowhere.parquet"),
        (("--sae_model_path", "nowhere.pt"), "nowhere.pt"),
        (("--request", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_flags_are_refused(setup, flags, message):
    argv = ["--llama_model_dir", str(setup[0]), "--sae_model_path", str(setup[1]), "--prompt", "a"]
    with pytest.raises((UserError, OSError), match=message):
        terminal.main([*argv, *flags])


def test_older_checkpoints_take_what_they_do_not_know_from_flags(setup, tmp_path, capsys):
    sae = make_sae()
    names = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "b_pre": sae.b_pre}
    torch.save({**names, "decoder.weight": sae.W_dec.T.contiguous()}, tmp_path / "old.pt")
    argv = ["--llama_model_dir", str(setup[0]), "--sae_model_path", str(tmp_path / "old.pt")]
    argv += ["--prompt", PROMPT, "--steer", "3=+1", "--max_new_tokens", "2", "--json"]
    with pytest.raises(UserError, match="--sae_layer_idx"):
        terminal.main([*argv, "--k", "8"])
    terminal.main(
        [*argv, "--k", "8", "--sae_layer_idx", "1", "--hook_point", "attn_norm", "--no_bos"]
    )
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    # No maximum is known: the strength is the raw activation.
    assert pair["effects"][0]["target"] - pair["effects"][0]["present"] == pytest.approx(1.0)
