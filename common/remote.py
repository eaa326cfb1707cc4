"""A large model behind an address as one function, for whoever has one; nothing here runs unless asked for.

    complete("http://localhost:8000/v1", "my-model", [{"role": "user", "content": "Who are you?"}]) -> "I am ..."

speaks the chat protocol of OpenAI's API, which vLLM, llama.cpp, Ollama and most hosts understand too, with the standard
library alone. Servers are busy and connections break, so it tries again, waiting longer each time; a mistake that
trying again cannot mend (a wrong key, a wrong model) stops at once. Either way the end is one sentence.
"""
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request

from common.errors import UserError

KEY = "OPENAI_API_KEY"  # the environment variable that other clients read too
LONGEST_WAIT = 60  # seconds, whatever a server asks for


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):  # urllib would hand the key on to the new address, and turn POST into GET
        return None


def complete(url, model, messages, max_tokens=2048, temperature=0.0, key=None, timeout=60, tries=4):
    """The answer of `model` at `url` to a conversation: list[{"role", "content"}] -> str without
    white space around it, "" where it says nothing.

    url      the base address, which usually ends in /v1
    key      None: the environment variable OPENAI_API_KEY where it is set; local servers need none. It is sent over https
             or to this machine, never readable over a network
    timeout  seconds without a sign of life until a try counts as failed
    tries    how often at most: after 1, 2, 4, ... seconds, or after what the server's Retry-After says

    Raises UserError with one sentence after the last try, or at once where another try could not help.
    """
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    request = _request(url, key, body)
    opener = urllib.request.build_opener(_NoRedirect)
    for attempt in range(1, tries + 1):
        wait = 2 ** (attempt - 1)
        try:
            with opener.open(request, timeout=timeout) as response:
                return _text(response.read(), url)
        except urllib.error.HTTPError as error:
            failure = f"answers {error.code} ({_reason(error)})"
            if error.code not in (408, 429) and error.code < 500:
                raise UserError(f"{url} {failure}: check the address, the model's name {model!r} and the key ({KEY}, which "
                                "is sent over https or to this machine only)") from None
            wait = _asked_wait(error, wait)
        except (ValueError, http.client.InvalidURL):  # the error's own words could hold the key
            raise UserError(f"{url} is no address, or {KEY} holds what no key does: write it as in "
                            "http://localhost:8000/v1") from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off in the middle
            failure = f"cannot be reached ({getattr(error, 'reason', None) or error or type(error).__name__})"
        if attempt < tries:
            time.sleep(wait)
    raise UserError(f"{url} {failure}, {tries} times: check the address and whether the server runs, then start again")


def _request(url, key, body):
    """The HTTP request. Raises UserError for an address of another kind."""
    address = url.rstrip("/")
    address += "" if address.endswith("/chat/completions") else "/chat/completions"
    key = os.environ.get(KEY, "") if key is None else key
    if not address.startswith("https://") and not is_here(address):  # whoever listens on the way would have the key
        key = ""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key.strip()}"} if key else {})
    if not address.startswith(("http://", "https://")):  # urllib would open file:// too
        raise UserError(f"{url} is no address: it must begin with http:// or https://")
    return urllib.request.Request(address, json.dumps(body).encode(), headers)


def is_here(address):
    """Is the address one of this machine? (Where it is none at all, urllib will say so.)"""
    try:
        host = urllib.parse.urlsplit(address).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(body, url):
    """The answer's words in the body of a response."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
        return "" if text is None else text.strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        start = body[:80].decode("utf-8", "replace")
        raise UserError(f"{url} does not answer as a chat server does (its answer begins {start!r}): check the "
                        "address, which usually ends in /v1") from None


def _reason(error):
    """What the server says was wrong, in its own words where it says any."""
    try:
        return " ".join(json.loads(error.read())["error"]["message"].split())[:200]  # one line
    except (ValueError, LookupError, TypeError, AttributeError, OSError, http.client.HTTPException):
        return error.reason or "no reason given"


def _asked_wait(error, wait):
    """The seconds that the server asks for in Retry-After, or `wait` where it asks for none."""
    try:
        return min(max(0, float(error.headers.get("Retry-After"))), LONGEST_WAIT)
    except (TypeError, ValueError):  # it is not there, or a date
        return wait
