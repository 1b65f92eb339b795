"""The steering page: its API, its sessions, its locks, and the page itself in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright import sync_api
from tiny_steering import LABELS, make_sae, make_studio, one_thread, write_setup

import saint.completions
import saint.steering
from llama_3_inference_text_completion_gradio import choose_auth, launch
from saint.runtime import UserError
from saint.steering_desk import DEFAULT_STRENGTH, TEMPERATURE, TOP_P, Desk

REPOSITORY = Path(__file__).parent.parent
PROMPT = "Senior diplomats met to discuss"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@dataclass
class Brake:
    """Makes generation slow and counts its steps; shared with the server's thread."""

    seconds: float = 0.0
    steps: int = 0


@dataclass
class Site:
    """A running page."""

    url: str
    desk: Desk
    brake: Brake


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    model_dir, _ = write_setup(tmp_path_factory.mktemp("page"))
    studio, guides = make_studio(model_dir, make_sae(), make_sae(layer=2, seed=4))
    brake, original = Brake(), saint.completions.generate

    def slow(*args, **kwargs):
        for step in original(*args, **kwargs):
            brake.steps += 1
            time.sleep(brake.seconds)
            yield step

    saint.completions.generate = slow
    page, desk = launch(studio, guides, host="127.0.0.1", port=None, share=False, auth=None)
    yield Site(str(page.local_url).rstrip("/"), desk, brake)
    page.close()
    saint.completions.generate = original


@pytest.fixture
def client(site):
    from gradio_client import Client

    return Client(site.url, verbose=False, analytics_enabled=False)


def steer_request(**changes):
    record = {"prompts": [PROMPT], "steer": ["0:3=add:1.5"], "max_new_tokens": 8}
    return record | changes


def test_api_steers_as_the_library_does(site, client):
    answer = client.predict(steer_request(temperature=1.0, seed=4), api_name="/steer")
    request = saint.steering.request_from_json(answer["request"])
    pairs = saint.completions.complete_pairs(site.desk.studio, request)
    assert answer["pairs"] == json.loads(json.dumps([pair.to_json() for pair in pairs]))
    assert answer["pairs"][0]["plain"]["text"] != answer["pairs"][0]["steered"]["text"]


def test_named_api_is_all_there_is(client):
    names = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    wanted = "steer search latent prompt_view dose steering_vector info"
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

    monkeypatch.setattr("saint.steering_desk.complete_pairs", broken)
    with pytest.raises(Exception, match="server's log") as caught:
        client.predict(steer_request(), api_name="/steer")
    assert "secret" not in str(caught.value)


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


def test_another_host_asks_for_the_printed_password(tmp_path):
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
        stderr=subprocess.DEVNULL,
        text=True,
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
    finally:
        watchdog.cancel()
        process.terminate()
        process.communicate(timeout=30)


def _free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def tab(site, browser):
    """An open page that has asked nobody but our server for anything."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(40_000)
    strangers, problems = [], []
    page.on("request", lambda r: strangers.append(r.url) if _foreign(r.url) else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    site.brake.seconds = 0.0
    open_page(page, site.url)
    yield page
    context.close()
    assert strangers == [] and problems == []


def _foreign(url):
    return not url.startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:"))


def open_page(page, url):
    page.goto(url)
    page.wait_for_selector("#mix .dials > *")


def field(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first


def choose(page, query="nuclear"):
    field(page, "query").fill(query)
    field(page, "query").press("Enter")
    page.locator("#results .choose").first.click()
    page.wait_for_selector("#mix .dial")


def compare(page):
    page.click("#run")
    page.wait_for_selector("#result .done")
    return [page.inner_text(f"#result [data-side={side}]") for side in ("plain", "steered")]


def test_search_choose_steer_compare_and_reload_the_link(site, tab):
    choose(tab)
    assert "nuclear weapons" in tab.inner_text("#results .card")
    tab.locator("#mix input[type=number]").fill("2.5")
    tab.locator("#mix input[type=number]").press("Tab")
    field(tab, "prompts").fill(f"{PROMPT}\nthe court")
    plain, steered = compare(tab)
    assert plain.startswith(PROMPT) and plain != steered
    assert tab.locator("#result .pair").count() == 2
    request = saint.steering.Request(
        (PROMPT, "the court"),
        (saint.steering.Setting(3, "add", 2.5),),
        temperature=TEMPERATURE,
        top_p=TOP_P,
    )
    pairs = saint.completions.complete_pairs(site.desk.studio, request)
    texts = tab.locator("#result [data-side=steered] .tok").all_inner_texts()
    assert "".join(texts[: len(pairs[0].steered.tokens)]) == "".join(pairs[0].steered.tokens)
    cells = tab.locator("#result table.effects >> nth=0 >> td").all_inner_texts()
    assert cells[2] == f"{pairs[0].effects[0].realised:.2f}×"
    tab.wait_for_function("location.search.includes('steer=')")
    open_page(tab, tab.url)
    tab.wait_for_selector("#result .done")
    again = [tab.inner_text(f"#result [data-side={side}]") for side in ("plain", "steered")]
    assert again == [plain, steered]
    assert tab.locator("#mix input[type=number]").input_value() == "2.5"


def test_stop_leaves_the_text_and_ends_the_work(site, tab):
    choose(tab)
    site.brake.seconds = 0.15
    tab.click("#run")
    tab.wait_for_selector("#result .caret")
    tab.wait_for_timeout(700)
    tab.click("#stop")
    tab.wait_for_timeout(1500)
    steps = site.brake.steps
    tab.wait_for_timeout(1500)
    assert site.brake.steps == steps
    assert PROMPT in tab.inner_text("#result")
    site.brake.seconds = 0.0
    compare(tab)


def test_closing_the_tab_ends_the_work(site, browser):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(40_000)
    open_page(page, site.url)
    site.brake.seconds = 0.15
    start = site.brake.steps
    page.click("#run")
    page.wait_for_selector("#result .caret")
    context.close()
    deadline = time.monotonic() + 20
    while True:
        steps = site.brake.steps
        time.sleep(1.5)
        if site.brake.steps == steps:
            break
        assert time.monotonic() < deadline, "generation went on for a closed tab"
    site.brake.seconds = 0.0
    assert steps - start < 2 * 40, "it ran to its end"


def test_labels_and_model_text_are_never_markup(site, tab):
    choose(tab, "bold")
    assert LABELS[9] in tab.inner_text("#results .card")
    assert LABELS[9] in tab.inner_text("#mix .dial")
    assert tab.locator("#results b, #mix b").count() == 0
    field(tab, "prompts").fill("<img src=x onerror=window.hacked=1> the")
    assert "<img" in compare(tab)[0]
    assert tab.evaluate("window.hacked") is None and tab.locator("#result img").count() == 0


def test_modes_remove_prompt_view_dose_and_export(site, tab):
    choose(tab)
    tab.select_option("#mix select", "scale")
    assert "multiplies" in tab.inner_text("#mix .says")
    tab.select_option("#mix select", "add")
    tab.click("#look")
    tab.wait_for_selector("#view table.heat")
    tab.get_by_role("tab", name="Find the dose").click()
    tab.click("#sweep")
    tab.wait_for_selector("#dose .doseplot")
    tab.wait_for_function("document.querySelectorAll('#dose tbody tr').length === 9")
    tab.get_by_role("tab", name="Keep and share").click()
    tab.click("#export")
    href = tab.get_attribute("#download a", "href")
    from safetensors.torch import load

    vector = load(base64.b64decode(href.split(",")[1]))["vector"]
    dictionary = site.desk.studio.dictionaries[0]
    assert vector.tolist() == pytest.approx(
        (DEFAULT_STRENGTH * dictionary.units[3] * dictionary.sae.W_dec[3]).tolist(), rel=1e-5
    )
    tab.click("#mix .remove")
    assert "Nothing chosen" in tab.inner_text("#mix")


def test_json_and_presets_bring_settings_back(site, tab):
    choose(tab)
    tab.click("#settings button")
    field(tab, "seed").fill("17")
    compare(tab)
    tab.get_by_role("tab", name="Keep and share").click()
    tab.wait_for_function("document.querySelector('#json').innerText.includes('steered')")
    assert '"seed": 17' in tab.inner_text("#json")
    field(tab, "preset_name").fill("mine")
    kept = tab.evaluate("localStorage.saint_presets")
    tab.click("#preset_save")
    tab.wait_for_function("kept => localStorage.saint_presets !== kept", arg=kept)
    open_page(tab, site.url)
    assert "Nothing chosen" in tab.inner_text("#mix")
    tab.get_by_role("tab", name="Keep and share").click()
    field(tab, "preset_choice").click()
    tab.get_by_role("option", name="mine").click()
    tab.click("#settings button")
    sync_api.expect(field(tab, "seed")).to_have_value("0")
    tab.click("#preset_load")
    tab.wait_for_selector("#mix .dial")
    assert "nuclear weapons" in tab.inner_text("#mix .dial")
    sync_api.expect(field(tab, "seed")).to_have_value("17")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_overflows_the_window(site, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()
    page.set_default_timeout(40_000)
    open_page(page, site.url)
    choose(page)
    compare(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
