"""The steering page's API, its sessions and its locks."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import llama_3_inference_text_completion_gradio as demo
from llama_3_inference_text_completion_gradio import choose_auth
from saint.page.api import api_endpoints
from saint.page.handlers import PageHandlers, link_query, read_link
from saint.stage.errors import UserError
from saint.stage.program import run_stage
from saint.steering import completions, settings
from saint.steering.dose import dose_request, sweep
from saint.steering.settings import Limits, Request, Setting
from saint.steering.studio import EXAMPLE_PROMPTS
from tests.support.steering_site import PROMPT, Site, running_site
from tests.support.tiny_steering import LABELS, one_thread, write_setup

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture
def client(site):
    from gradio_client import Client

    return Client(site.url, verbose=False, analytics_enabled=False)


def steer_request(**changes):
    record = {"prompts": [PROMPT], "steer": ["0:3=add:1.5"], "max_new_tokens": 8}
    return record | changes


def test_api_steers_as_the_library_does(site, client):
    answer = client.predict(steer_request(temperature=1.0, seed=4), api_name="/steer")
    request = settings.request_from_json(answer["request"])
    pairs = completions.complete_pairs(site.handlers.studio, request)
    assert answer["pairs"] == json.loads(json.dumps([pair.to_json() for pair in pairs]))
    assert answer["pairs"][0]["plain"]["text"] != answer["pairs"][0]["steered"]["text"]


def test_named_api_is_all_there_is(client):
    names = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    wanted = "steer search latent concept prompt_view attribute dose steering_vector info"
    assert names == {f"/{name}" for name in wanted.split()}


def test_api_searches_and_looks(client):
    hits = client.predict("nuclear", "label", api_name="/search")
    assert {(h["sae"], h["latent"]) for h in hits} == {(0, 3), (1, 3)}
    assert client.predict("court", "example text", api_name="/search")
    assert client.predict(5, 1, api_name="/latent")["label"] == LABELS[5]
    view = client.predict(PROMPT, False, api_name="/prompt_view")
    assert "".join(view["tokens"]) == PROMPT
    assert all(len(row["activations"]) == len(view["tokens"]) for row in view["latents"])
    info = client.predict(api_name="/info")
    assert [sae["layer"] for sae in info["saes"]] == [1, 2]


def test_two_clients_at_once_get_what_each_gets_alone(site):
    from gradio_client import Client

    requests = [
        steer_request(steer=["0:3=add:2.0"], temperature=1.0, seed=1, max_new_tokens=12),
        steer_request(steer=["1:5=set:1.0"], prompts=["the court ruling"], seed=2, temperature=0.7),
        steer_request(steer=["0:9=off"], chat=True, temperature=1.0, seed=3),
    ]
    clients = [Client(site.url, verbose=False, analytics_enabled=False) for _ in requests]

    def ask(i):
        return clients[i].predict(requests[i], api_name="/steer")

    alone = [ask(i) for i in range(3)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, [0, 1, 2, 2, 1, 0]))
    assert together == [alone[i] for i in (0, 1, 2, 2, 1, 0)]


def test_api_sends_progress_and_the_result_last(client):
    job = client.submit(steer_request(), api_name="/steer")
    *progress, last = list(job)
    texts = [update["texts"][0] for update in progress]
    assert len(texts) >= 8 and all(a[1] <= b[1] for a, b in zip(texts, texts[1:], strict=False))
    assert texts[-1][1] == last["pairs"][0]["steered"]["text"]


@pytest.mark.parametrize(
    ("endpoint", "data"),
    [
        ("steer", [steer_request(max_new_tokens=200)]),
        ("dose", ["0:3=add:1", [PROMPT] * 2, 0, "both", False]),
    ],
)
@pytest.mark.parametrize("how", ["cancels", "leaves"])
def test_api_work_ends_with_its_client(site, client, endpoint, data, how):
    start, site.brake.seconds = site.brake.steps, 0.1
    if how == "cancels":
        job = client.submit(*data, api_name=f"/{endpoint}")
        next(iter(job))
        job.cancel()
    else:
        body = json.dumps({"data": data}).encode()
        headers = {"Content-Type": "application/json"}
        _, answer = fetch(f"{site.url}/gradio_api/call/{endpoint}", body, headers)
        event = json.loads(answer)["event_id"]
        url = f"{site.url}/gradio_api/call/{endpoint}/{event}"
        with urllib.request.urlopen(url, timeout=20) as stream:
            assert b"event: generating" in stream.readline()
    site.wait_until_idle()
    site.brake.seconds = 0.0
    assert site.brake.steps - start < 80, "it ran to its end"  # 400 steps, or 9 strengths of 24
    assert client.predict(api_name="/info")


def test_dose_of_any_latent_honours_where_and_chat(site, client):
    studio, ask = site.handlers.studio, ("1:5=set:1", [PROMPT], 3)
    wanted = Request((PROMPT,), (Setting(5, "set", 1.0, 1),), "generated", seed=3, chat=True)
    answers = []
    for where, chat in (("generated", True), ("prompt", True), ("generated", False)):
        varied = dose_request(studio, replace(wanted, where=where, chat=chat))
        *_, expected = sweep(studio, wanted.settings[0], varied)
        answer = client.predict(*ask, where, chat, api_name="/dose")
        assert answer == json.loads(json.dumps(expected.to_json()))
        answers.append([(point["surprise"], point["concept"]) for point in answer["points"]])
    assert len(set(map(str, answers))) == 3 and answers[0][0] == answers[1][0]


@pytest.mark.parametrize(
    "changes", [{"prompts": 1}, {"prompts": 3}, {"new_tokens": 16}, {"tokens": 250}]
)
def test_what_the_page_accepts_can_be_swept(site, changes):
    studio = replace(site.handlers.studio, limits=replace(Limits(), **changes))
    handlers = PageHandlers(studio, site.handlers.guides)
    mix = [{"sae": 0, "latent": 3, "mode": "add", "strength": 1.0}]
    settings = (mix, "both", 10, 0.0, 1.0, 0, False)
    long = "the " * 199 + "court"
    assert [*handlers.compare([], long, *settings)]
    for prompts in (long, ""):  # the examples stand in for none
        assert [*handlers.sweep_chosen("0:3", prompts, *settings)][-1].count('scope="row"') == 9
    points = [*api_endpoints(handlers)["dose"]("0:3=add:1")][-1]["points"]
    assert len(points) == 9 and points[0]["sample"].startswith(EXAMPLE_PROMPTS[0])


def test_a_sweep_of_the_page_takes_own_prompts_first_and_examples_where_there_is_room(
    site, monkeypatch
):
    swept = Mock(return_value=iter(()))
    monkeypatch.setattr("saint.page.handlers.sweep", swept)
    mix = [{"sae": 0, "latent": 3, "mode": "add", "strength": 1.0}]
    settings = (mix, "both", 10, 0.0, 1.0, 0)
    for own, chat, expected in (
        (["one"], False, ("one", *EXAMPLE_PROMPTS[:3])),
        (["one"], True, ("one",)),
        (["1", "2", "3", "4", "5"], False, ("1", "2", "3", "4")),
        (["two", "lines"], True, ("two\nlines",)),
    ):
        list(site.handlers.sweep_chosen("0:3", "\n".join(own), *settings, chat))
        assert swept.call_args.args[2].prompts == expected


def test_too_many_settings_are_refused_everywhere(site, client):
    handlers, n = site.handlers, site.handlers.studio.limits.settings
    mix = [{"sae": 0, "latent": i, "mode": "add", "strength": 1.0} for i in range(n + 1)]
    steer = [f"0:{i}=add:1.0" for i in range(n + 1)]
    link = read_link(link_query({"request": steer_request(steer=steer)}).partition("=")[2])
    message = f"{n + 1} steered latents: at most {n} at a time"
    for act in (
        lambda: [*handlers.compare([], PROMPT, mix, "both", 5, 0.0, 1.0, 0, False)],
        lambda: handlers.view(PROMPT, mix, False),
        lambda: handlers.export(mix),
        lambda: handlers.fields_and_turns(link),
        lambda: client.predict(steer_request(steer=steer), api_name="/steer"),
        lambda: client.predict(steer, api_name="/steering_vector"),
    ):
        with pytest.raises(Exception, match=message):
            act()
    assert handlers.view(PROMPT, mix[:n], False) and handlers.export(mix[:n])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (steer_request(steer=["0:999=add:1.0"]), "0 to 63"),
        (steer_request(steer=["rm -rf"]), "setting"),
        (steer_request(max_new_tokens=10**6), "at most"),
        (steer_request(prompts=["a" * 10**5]), "characters"),
        (steer_request(prompts="a"), "list of texts"),
        (steer_request(seed=1.5), "seed"),
        ([], "object"),
    ],
)
def test_bad_requests_are_messages_without_a_stack(client, request_, message):
    with pytest.raises(Exception, match=message) as caught:
        client.predict(request_, api_name="/steer")
    assert "Traceback" not in str(caught.value) and ".py" not in str(caught.value)


def test_unexpected_errors_do_not_leak(site, client, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("secret path /etc/shadow")

    monkeypatch.setattr("saint.page.api.stream_pairs", broken)
    with pytest.raises(Exception, match="server's log") as caught:
        client.predict(steer_request(), api_name="/steer")
    assert "secret" not in str(caught.value)


def fill_the_gpu(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.\nAnd much more.")


def fill_the_computer(*_args, **_kwargs):
    torch.empty(2**60, dtype=torch.uint8)


def fill_python(*_args, **_kwargs):
    raise MemoryError  # as Python raises it: without a word


def map_too_much(*_args, **_kwargs):
    raise RuntimeError("unable to mmap 9 bytes from file <a.pth>: Cannot allocate memory (12)")


@pytest.mark.parametrize("full", [fill_the_gpu, fill_the_computer, fill_python, map_too_much])
def test_full_memory_is_a_message_that_says_what_to_reduce(client, monkeypatch, full):
    monkeypatch.setattr("saint.page.api.stream_pairs", full)
    with pytest.raises(Exception, match="fewer or shorter prompts, or ask for fewer new tokens"):
        client.predict(steer_request(), api_name="/steer")


PAGE = "llama_3_inference_text_completion_gradio.py"
TERMINAL = "llama_3_inference_text_completion.py"
FEWER_SAES = "load fewer SAEs, or use --dtype bfloat16"
SHORTER = "use fewer or shorter prompts, or a lower --max_new_tokens"


@pytest.mark.parametrize(
    ("program", "full", "says"),
    [
        (PAGE, fill_the_gpu, f"GPU's memory is full: {FEWER_SAES} or --device cpu: CUDA out of"),
        (PAGE, fill_the_computer, f"computer's memory is full: {FEWER_SAES}: [enforce fail"),
        (PAGE, fill_python, f"computer's memory is full: {FEWER_SAES}: MemoryError"),
        (TERMINAL, fill_the_gpu, f"GPU's memory is full: {SHORTER}: CUDA out of"),
        (TERMINAL, fill_the_computer, f"computer's memory is full: {SHORTER}: [enforce fail"),
        (TERMINAL, map_too_much, f"computer's memory is full: {SHORTER}: unable to mmap"),
    ],
)
def test_full_memory_ends_a_program_with_one_line(
    monkeypatch, tmp_path, capsys, program, full, says
):
    model_dir, sae_path = write_setup(tmp_path)
    argv = [program, "--llama_model_dir", str(model_dir), "--sae_model_path", str(sae_path)]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("saint.steering.studio.load_studio", full)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(REPOSITORY / program), run_name="__main__")
    errors = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 1 and errors[-1].startswith(f"error: the {says}")
    assert not any("Traceback" in line for line in errors)


def fetch(url, data=None, headers=None):
    request = urllib.request.Request(url, data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_nothing_on_disk_is_served_and_nothing_is_taken(site):
    for path in (REPOSITORY / "sae.py", REPOSITORY / "pyproject.toml", Path("/etc/passwd")):
        status, body = fetch(f"{site.url}/gradio_api/file={path}")
        assert status in (403, 404) and b"root:" not in body and b"import" not in body
    boundary = "x"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.html"\r\n'
    body += f"Content-Type: text/html\r\n\r\n{'<b>hello</b>' * 50}\r\n--{boundary}--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    status, _ = fetch(f"{site.url}/gradio_api/upload", body.encode(), headers)
    assert status in (400, 403, 404, 413)


def test_auth_is_made_up_exactly_when_others_can_come():
    assert choose_auth(None, host="127.0.0.1", share=False) is None
    assert choose_auth(None, host="localhost", share=False) is None
    for host, share in (("0.0.0.0", False), ("127.0.0.1", True), ("192.168.1.5", False)):
        first, second = (choose_auth(None, host=host, share=share) for _ in range(2))
        assert first and second and first != second and len(first[1]) >= 12
    assert choose_auth("ann:a:b", host="0.0.0.0", share=False) == ("ann", "a:b")
    for bad in ("ann", "ann:", ":x"):
        with pytest.raises(UserError, match="user:password"):
            choose_auth(bad, host="127.0.0.1", share=False)


def share(setup, *flags):
    port = _free_port()
    argv = ["--llama_model_dir", str(setup[0]), "--sae_model_path", str(setup[1])]
    argv += ["--device", "cpu", "--share", "--port", str(port), *flags]
    return f"http://127.0.0.1:{port}", lambda: demo.main(argv)


def test_sharing_asks_for_the_printed_one_time_password(tmp_path, monkeypatch, capsys):
    from gradio_client import Client

    url, main = share(write_setup(tmp_path))
    tunnel = Mock(return_value="https://example.gradio.live")
    monkeypatch.setattr("gradio.networking.setup_tunnel", tunnel)
    visited = []

    def visit():
        *login, opened, public = capsys.readouterr().out.splitlines()
        assert (opened, public) == (f"open {url}", "public link https://example.gradio.live")
        (words,) = re.findall(r"^one-time login: user (\S+), password (\S+)$", "\n".join(login))
        assert fetch(f"{url}/config")[0] == 401
        visitor = Client(url, auth=words, verbose=False, analytics_enabled=False)
        visited.append(visitor.predict(api_name="/info"))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "threading", Mock(Event=lambda: Mock(wait=visit)))
    with pytest.raises(KeyboardInterrupt):
        main()
    assert visited[0]["saes"] and tunnel.call_count == 1


@pytest.mark.parametrize("failure", [RuntimeError("no share server"), TimeoutError("no answer")])
def test_no_public_link_is_one_clear_line(tmp_path, monkeypatch, capsys, failure):
    url, main = share(write_setup(tmp_path))
    monkeypatch.setattr("gradio.networking.setup_tunnel", Mock(side_effect=failure))
    serving = Mock(side_effect=AssertionError("it serves without a public link"))
    monkeypatch.setattr(demo, "threading", Mock(Event=lambda: Mock(wait=serving)))
    with pytest.raises(SystemExit) as exit_:
        run_stage(main)
    assert exit_.value.code == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[-1].startswith("error: --share: Gradio's")
    with pytest.raises(urllib.error.URLError):  # nothing listens any more
        fetch(url)


def test_another_host_asks_for_the_printed_password_until_ctrl_c(tmp_path):
    from gradio_client import Client

    model_dir, sae_path = write_setup(tmp_path)
    port = _free_port()
    command = [sys.executable, "llama_3_inference_text_completion_gradio.py", "--host", "0.0.0.0"]
    command += ["--llama_model_dir", str(model_dir), "--sae_model_path", str(sae_path)]
    command += ["--port", str(port), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in a shell's background, SIGINT is ignored by all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        watchdog = threading.Timer(100, process.kill)
        watchdog.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("open "):
                break
        login = re.search(r"user (\S+), password (\S+)", "".join(lines))
        assert login, "".join(lines)
        url = f"http://127.0.0.1:{port}"
        assert fetch(f"{url}/config")[0] == 401
        with pytest.raises(Exception, match=r"[Aa]uth|[Cc]redential|[Ll]og"):
            Client(url, auth=("saint", "wrong"), verbose=False, analytics_enabled=False)
        client = Client(url, auth=(login[1], login[2]), verbose=False, analytics_enabled=False)
        assert client.predict(api_name="/info")["saes"][0]["n_labels"] == len(LABELS)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1].splitlines()
        assert process.returncode == 130 and errors[-1] == "interrupted: the page is closed"
        assert not any("Traceback" in line for line in errors)
    finally:
        watchdog.cancel()
        process.kill()


def _free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_in_use_is_one_line_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used"):
            demo.require_port("127.0.0.1", port)
    demo.require_port("127.0.0.1", port)
