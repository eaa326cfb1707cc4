"""The client against a server of our own on this machine: answers, failures that pass, failures that stay."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import remote
from common.remote import complete
from common.errors import UserError

ASK = [{"role": "user", "content": "Who are you?"}]


def says(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(), {}


class Server(ThreadingHTTPServer):
    """Gives the scripted (status, body, headers) in turn, the last one for ever, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.got, self.url = [], [], f"http://127.0.0.1:{self.server_port}/v1"
        self.quiet = threading.Event()  # until it is set, a scripted None is silence


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.got.append({"path": self.path, "key": self.headers["Authorization"], **body})
        reply = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        if reply is None:
            server.quiet.wait(10)
            return
        status, text, headers = reply
        self.send_response(status)
        for name, value in ({"Content-Length": len(text)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(remote.KEY, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.quiet.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch):
    """The seconds it would have waited, without waiting."""
    waited = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_an_answer_and_what_was_asked(server, waits, end):
    server.script = [says(" I am Pip. \n")]
    assert complete(server.url + end, "tiny", ASK, max_tokens=7, temperature=0.5) == "I am Pip."
    assert server.got == [{"path": "/v1/chat/completions", "key": None, "model": "tiny", "messages": ASK,
                           "max_tokens": 7, "temperature": 0.5}]
    assert waits == []


def test_defaults_are_those_of_a_judge(server):
    server.script = [says("ok")]
    complete(server.url, "tiny", ASK)
    assert (server.got[0]["max_tokens"], server.got[0]["temperature"]) == (2048, 0.0)


def test_no_words_are_an_empty_answer(server):
    server.script = [says(None)]
    assert complete(server.url, "tiny", ASK) == ""


def test_the_key_comes_from_the_environment_and_an_argument_goes_first(server, monkeypatch):
    server.script = [says("ok")]
    monkeypatch.setenv(remote.KEY, "secret\n")  # as a file read by a shell leaves it
    complete(server.url, "tiny", ASK)
    complete(server.url, "tiny", ASK, key="other")
    complete(server.url, "tiny", ASK, key="")
    assert [got["key"] for got in server.got] == ["Bearer secret", "Bearer other", None]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_failure_that_passes_is_waited_out(server, waits, status):
    server.script = [(status, b"busy", {}), (status, b"busy", {}), says("ok")]
    assert complete(server.url, "tiny", ASK) == "ok"
    assert waits == [1, 2]


@pytest.mark.parametrize("asked, waited", [("5", 5), ("9999", remote.LONGEST_WAIT), ("-1", 0), ("nan", 0),
                                           ("Wed, 21 Oct 2026 07:28:00 GMT", 1)])
def test_the_server_may_say_how_long_to_wait(server, waits, asked, waited):
    server.script = [(429, b"", {"Retry-After": asked}), says("ok")]
    assert complete(server.url, "tiny", ASK) == "ok"
    assert waits == [waited]


def test_a_connection_cut_in_the_middle_is_tried_again(server, waits):
    status, body, _ = says("ok")
    server.script = [(status, body[:9], {"Content-Length": len(body)}), says("ok")]
    assert complete(server.url, "tiny", ASK) == "ok"
    assert waits == [1]


def test_a_failure_that_stays_ends_in_one_sentence(server, waits):
    server.script = [(500, b'{"error": {"message": "out of memory"}}', {})]
    with pytest.raises(UserError, match=r"/v1 answers 500 \(out of memory\), 3 times: check") as error:
        complete(server.url, "tiny", ASK, tries=3)
    assert len(server.got) == 3 and waits == [1, 2] and "\n" not in str(error.value)


@pytest.mark.parametrize("status, body, said", [(401, b'{"error": {"message": "wrong key"}}', r"401 \(wrong key\)"),
                                                (404, b"<html>", r"404 \(Not Found\).*'tiny'"),
                                                (400, b'["?"]', r"400 \(Bad Request\)")])
def test_what_another_try_cannot_mend_stops_at_once(server, waits, status, body, said):
    server.script = [(status, body, {})]
    with pytest.raises(UserError, match=said):
        complete(server.url, "tiny", ASK)
    assert len(server.got) == 1 and waits == []


def test_a_redirect_does_not_carry_the_key_away(server, waits):
    server.script = [(302, b"", {"Location": server.url + "/elsewhere"})]
    with pytest.raises(UserError, match="answers 302"):
        complete(server.url, "tiny", ASK, key="secret")
    assert len(server.got) == 1


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": "hi"}]}',
                                  b'{"choices": [{"message": {"content": 7}}]}', b"\xff\xfe"])
def test_an_answer_of_another_protocol_is_said(server, waits, body):
    server.script = [(200, body, {})]
    with pytest.raises(UserError, match="does not answer as a chat server does"):
        complete(server.url, "tiny", ASK)
    assert waits == []


def test_silence_times_out_and_is_tried_again(server, waits):
    server.script = [None]
    with pytest.raises(UserError, match=r"cannot be reached \(timed out\), 2 times"):
        complete(server.url, "tiny", ASK, timeout=0.1, tries=2)
    assert len(server.got) == 2 and waits == [1]


def test_nobody_there(waits, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused\), 4 times"):
        complete("http://127.0.0.1:1/v1", "tiny", ASK)
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/hostname", "", "http://a b/v1", "http://a:b/v1"])
def test_an_address_that_is_none(waits, url):
    with pytest.raises(UserError, match="is no address"):
        complete(url, "tiny", ASK)
    assert waits == []


def test_the_key_is_never_printed(server, waits):
    server.script = [says("ok")]
    with pytest.raises(UserError) as error:
        complete(server.url, "tiny", ASK, key="sec\nret")
    assert "sec" not in str(error.value) and "ret" not in str(error.value)


@pytest.mark.parametrize("url, sent", [("https://api.example.org/v1", True), ("http://localhost:8000/v1", True), ("http://127.0.0.1/v1", True),
                                       ("http://[::1]:80/v1", True), ("http://api.example.org/v1", False), ("http://10.0.0.5/v1", False),
                                       ("http://localhost@example.org/v1", False), ("http://localhost.example.org/v1", False)])
def test_the_key_never_travels_readable_over_a_network(monkeypatch, url, sent):
    monkeypatch.setenv(remote.KEY, "secret")
    assert ("Authorization" in remote._request(url, None, {}).headers) == sent


def test_what_a_server_says_commands_no_terminal(server, waits):
    server.script = [(400, json.dumps({"error": {"message": "no \x1b[2Jsuch\x07\u202e model"}}).encode(), {})]
    with pytest.raises(UserError) as error:
        remote.complete(server.url, "m", [])
    assert "no \\x1b[2Jsuch\\x07\\u202e model" in str(error.value)
