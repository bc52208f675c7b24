"""The demo, as the README has it."""

import re
import signal
import sys

import httpx

from tests.support.processes import ROOT, ProxyProcess, run_process


def start_demo(environment: dict[str, str], *arguments: str) -> ProxyProcess:
    return ProxyProcess(
        run_process([sys.executable, str(ROOT / "run-mitmproxy.py"), "demo", *arguments], environment, ROOT)
    )


def test_once_shows_a_refused_and_an_accepted_request_and_ends(base_environment: dict[str, str]) -> None:
    demo = start_demo(base_environment, "--once")
    assert demo.wait_until_ended() == 0
    assert re.search(r"-> 401 .*\n(.*\n)+.*-> 200 .*demo-user", demo.output)
    assert "Traceback" not in demo.output


def test_it_stays_up_with_lines_to_copy_until_it_is_interrupted(
    base_environment: dict[str, str], client: httpx.Client
) -> None:
    demo = start_demo(base_environment)
    assert demo.wait_for(re.compile("until you press Ctrl-C"))
    urls = re.findall(r"^ *curl -i (http://\S+)$", demo.output, re.MULTILINE)
    assert [client.get(url).status_code for url in urls] == [401, 200]
    (page,) = re.findall(r"^its status page +(http://\S+)$", demo.output, re.MULTILINE)
    assert "demo-user" in client.get(page).text
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait_until_ended() == 0
    assert "Traceback" not in demo.output
